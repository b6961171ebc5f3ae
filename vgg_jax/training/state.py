"""The training state and its creation."""

import math
import typing
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.training import train_state

from vgg_jax.errors import UserError
from vgg_jax.model import HEAD_LAYERS, VGG
from vgg_jax.training.optimizer import MomentumState


@typing.no_type_check  # at run time: Flax annotates `params` as FrozenDict, but takes any tree
class TrainState(train_state.TrainState):
    """Everything that changes in a run: step, parameters, optimizer state and the running statistics of batch norm.

    `params` holds the parameters that train. `frozen_params` maps the names of the frozen layers to their parameters,
    which have neither gradients nor optimizer state. `plateau` is the state of `optimizer.make_plateau` if the schedule
    is plateau. `ema` holds the exponential moving averages of `params` and `batch_stats` if `ema_decay` is not 0.
    """

    batch_stats: Any  # empty without batch norm
    frozen_params: Any = struct.field(default_factory=dict)
    plateau: Any = struct.field(default_factory=dict)
    ema: Any = struct.field(default_factory=dict)
    ema_decay: float = struct.field(default=0.0, pytree_node=False)
    head_layers: tuple[str, ...] = struct.field(default=(), pytree_node=False)  # the names in `VGG.head_layers`

    @property
    def rate_scale(self) -> Any:
        """Return the factor on the learning rate of the schedule."""
        return self.plateau.scale if self.plateau else 1.0

    def apply_gradients(self, *, grads: Any, finite: Any = True, **fields: Any) -> "TrainState":
        """Return the state after one step of the optimizer, with new values of `fields`.

        If `finite` is False, only the step counter advances.

        Args:
          grads: the gradients, a tree as `params`.
          finite: a boolean scalar.
          **fields: new values of other fields, such as `batch_stats`.
        """
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(grads, self.opt_state, self.params, finite=finite)
        if self.plateau:
            updates = jax.tree.map(lambda update: self.plateau.scale.astype(update.dtype) * update, updates)
        params = optax.apply_updates(self.params, updates)
        state = self.replace(step=self.step + 1, params=params, opt_state=opt_state, **fields)
        if self.ema:
            state = state.replace(ema=state.next_ema())

        def choose(new: Any, old: Any) -> Any:
            # `optimizer.momentum` has already chosen by `finite`.
            return new if isinstance(new, MomentumState) else jnp.where(finite, new, old)

        chosen = jax.tree.map(choose, state, self, is_leaf=lambda node: isinstance(node, MomentumState))
        after: TrainState = chosen.replace(step=state.step)
        return after

    def next_ema(self) -> dict[str, Any]:
        """Return the exponential moving averages after this step; a micro-batch before the last leaves them unchanged.

        After n updates the decay is at most (1 + n) / (10 + n), as in TensorFlow, so the first networks lose their
        weight soon.
        """
        accumulates = isinstance(self.opt_state, optax.MultiStepsState)
        updates = self.opt_state.gradient_step if accumulates else self.step
        updated = self.opt_state.mini_step == 0 if accumulates else True
        decay = jnp.minimum(self.ema_decay, (1 + updates) / (10 + updates))
        new = {"params": self.params, "batch_stats": self.batch_stats}
        rate = jnp.where(updated, 1 - decay, 0.0).astype(jnp.float32)
        ema: dict[str, Any] = optax.incremental_update(new, self.ema, rate)
        return ema

    @property
    def variables(self) -> dict[str, Any]:
        """Return the variables of the model: all parameters, and the running statistics."""
        return self.variables_with(self.params)

    @property
    def evaluated_variables(self) -> dict[str, Any]:
        """Return the variables for evaluation: the exponential moving averages if there are any, else `variables`."""
        return evaluated_variables(vars(self))

    def variables_with(self, params: Any) -> dict[str, Any]:
        """Return the variables of the model with other values of the parameters that train."""
        return {"params": {**self.frozen_params, **params}, "batch_stats": self.batch_stats}


def evaluated_variables(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables for evaluation.

    Args:
      fields: the fields of a `TrainState`, or of a checkpoint of one.

    Returns:
      `params` and `batch_stats`. The latter is empty without batch norm.
    """
    trained = fields.get("ema") or fields
    params = {**(fields.get("frozen_params") or {}), **trained["params"]}
    return {"params": params, "batch_stats": trained["batch_stats"] or {}}


def create_train_state(
    key: jax.Array,
    model: VGG,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    source: Mapping[str, Any] | None = None,
    source_layers: Collection[str] = ("features",),
    frozen: Collection[str] = (),
    plateau: optax.GradientTransformationExtraArgs | None = None,
    ema_decay: float = 0.0,
    axes: jax.Array | np.ndarray | None = None,
) -> TrainState:
    """Return a state at step 0 with torchvision's initialization, or with layers of another network.

    Args:
      key: the key of the initialization.
      model: the network to train.
      optimizer: the optimizer of the parameters that are not frozen.
      image_shape: the shape (H, W, C) of an image.
      source: variables of another network, from which `source_layers` are taken, with their running statistics.
      source_layers: names of layers, `features` or `head`, as `VGG.layers_with_parameters` takes them.
      frozen: the frozen layers, named likewise. Batch norm in them keeps its running statistics.
      plateau: the transformation of `optimizer.make_plateau`, or None.
      ema_decay: the decay of the exponential moving averages; 0 means that there are none.
      axes: the principal axes that the first convolution starts from, as `with_axes` takes them, or None.

    Raises:
      ValueError: if a layer is unknown, if all layers are frozen, if layers of `source` are missing or have other
        shapes (with every mismatch), or if all features are taken and `source` has more of them.
    """
    variables = jax.jit(model.init)(key, jnp.zeros((1, *image_shape), model.dtype))
    if axes is not None:
        variables["params"]["conv1_1"]["kernel"] = with_axes(variables["params"]["conv1_1"]["kernel"], axes)
    if source is not None:
        variables = _take_layers(variables, source, model.layers_with_parameters(source_layers))
        others = [layer for layer in source["params"] if layer not in (*variables["params"], *HEAD_LAYERS)]
        if others and "features" in source_layers:
            raise UserError(
                f"the source also has {', '.join(others)}; expected the features of the network; "
                "choose another source, or name the layers to take"
            )
    frozen_layers = model.layers_with_parameters(frozen)
    params = {layer: p for layer, p in variables["params"].items() if layer not in frozen_layers}
    if not params:
        raise ValueError("all layers are frozen; expected at least one that trains")
    batch_stats = variables.get("batch_stats", {})
    state: TrainState = TrainState.create(  # type: ignore[no-untyped-call]  # Flax does not annotate it
        apply_fn=model.apply,
        params=params,
        frozen_params={layer: variables["params"][layer] for layer in frozen_layers},
        batch_stats=batch_stats,
        ema=jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats}) if ema_decay else {},
        ema_decay=ema_decay,
        head_layers=model.head_layers,
        plateau=plateau.init(jnp.zeros((), jnp.float32)) if plateau else {},
        tx=optimizer,
    )
    return state


def with_axes(kernel: jax.Array, axes: jax.Array | np.ndarray) -> jax.Array:
    """Return a kernel whose first channels are pairs of an axis and its negative; the other channels stay.

    The norm of each axis is the expected one of torchvision's initialization, so that all channels learn equally fast.

    Args:
      kernel: the kernel of the first convolution, (3, 3, C, F).
      axes: orthonormal columns, (9 C, 9 C).

    Returns:
      The kernel, in the shape and dtype of `kernel`.
    """
    *_, channels, features = kernel.shape
    count = min(axes.shape[1], features // 2)
    pairs = jnp.stack([axes[:, :count], -axes[:, :count]], -1).reshape(3, 3, channels, 2 * count)
    pairs = pairs * math.sqrt(2 * channels / features)
    return jnp.concatenate([pairs.astype(kernel.dtype), kernel[..., 2 * count :]], axis=-1)


def _take_layers(variables: Mapping[str, Any], source: Mapping[str, Any], layers: list[str]) -> dict[str, Any]:
    """Return `variables` with copies of layers of `source`, so that a donating step leaves `source` intact."""
    taken: dict[str, Any] = {}
    problems = []
    for collection, ours in variables.items():
        theirs = source.get(collection, {})
        taken[collection] = dict(ours)
        for layer in layers:
            expected, found = (jax.tree.map(jnp.shape, tree.get(layer)) for tree in (ours, theirs))
            if expected == found and layer in ours:
                taken[collection][layer] = jax.tree.map(lambda a, b: jnp.array(b, a.dtype), ours[layer], theirs[layer])
            elif expected != found:
                problems.append(f"{layer} is {found or 'missing'} in the source; expected {expected or 'none'}")
    if problems:
        raise UserError("\n".join(problems))
    return taken
