"""The training state and the pure functions that make and advance it."""

import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.training import train_state

from vgg_jax.errors import UserError
from vgg_jax.model import VGG
from vgg_jax.optimizer import MomentumState


class TrainState(train_state.TrainState):
    """Step, parameters, optimizer state, and batch norm's running statistics (empty without batch norm).

    `params` are those that train; `frozen_params`, from the names of other layers to theirs, stay as they are, and
    have neither gradient nor optimizer state. `plateau` is the state of `optimizer.make_plateau`, where there is one;
    `ema`, where `ema_decay` is not 0, the moving averages of `params` and `batch_stats`.
    """

    batch_stats: Any
    frozen_params: Any = struct.field(default_factory=dict)
    plateau: Any = struct.field(default_factory=dict)
    ema: Any = struct.field(default_factory=dict)
    ema_decay: float = struct.field(default=0.0, pytree_node=False)

    @property
    def rate_scale(self) -> Any:
        """What the schedule's learning rate is multiplied by."""
        return self.plateau.scale if self.plateau else 1.0

    def apply_gradients(self, *, grads: Any, finite: Any = True, **fields: Any) -> "TrainState":
        """The state after a step of the optimizer, and with other values of `fields`.

        Where `finite` is False, it is this state, one step later.
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
            return new if isinstance(new, MomentumState) else jnp.where(finite, new, old)  # that has chosen already

        chosen = jax.tree.map(choose, state, self, is_leaf=lambda node: isinstance(node, MomentumState))
        return chosen.replace(step=state.step)

    def next_ema(self) -> dict[str, Any]:
        """The moving averages after this step; as they were, where it is not the last of a batch that comes in parts.

        After n updates the decay is at most (1 + n) / (10 + n), as TensorFlow's: the first networks are soon forgotten.
        """
        in_parts = isinstance(self.opt_state, optax.MultiStepsState)
        updates = self.opt_state.gradient_step if in_parts else self.step
        updated = self.opt_state.mini_step == 0 if in_parts else True
        decay = jnp.minimum(self.ema_decay, (1 + updates) / (10 + updates))
        new = {"params": self.params, "batch_stats": self.batch_stats}
        return optax.incremental_update(new, self.ema, jnp.where(updated, 1 - decay, 0.0).astype(jnp.float32))

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is applied to: all parameters, and the running statistics."""
        return self.variables_with(self.params)

    @property
    def evaluated_variables(self) -> dict[str, Any]:
        """What evaluation applies it to: their moving averages where there are any, else `variables`."""
        return evaluated_variables(vars(self))

    def variables_with(self, params: Any) -> dict[str, Any]:
        """The same with other values of the parameters that train."""
        return {"params": {**self.frozen_params, **params}, "batch_stats": self.batch_stats}


def evaluated_variables(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `params` and `batch_stats` to evaluate, of the fields of a `TrainState` or of a checkpoint of one."""
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
) -> TrainState:
    """A state at step 0 with torchvision's initialisation, or with layers of another network.

    Args:
      key: of the initialisation.
      model: the network to train.
      optimizer: of the parameters that are not frozen.
      image_shape: (H, W, C) of the images.
      source: variables of another network, from which `source_layers` are taken, batch norm's statistics too.
      source_layers: names of layers, `features` or `head`, as `VGG.layers_with_parameters` takes them.
      frozen: the layers that stay as they are, named likewise; batch norm there keeps its running statistics.
      plateau: `optimizer.make_plateau`'s, where the schedule is that.
      ema_decay: of the moving averages that are evaluated; 0: there are none.

    Raises:
      ValueError: where a layer is unknown, is absent from `source` or has other shapes there, with every mismatch;
        where all features are taken, and `source` has more; and where all layers are frozen.
    """
    variables = jax.jit(model.init)(key, jnp.zeros((1, *image_shape), model.dtype))
    if source is not None:
        variables = _take_layers(variables, source, model.layers_with_parameters(source_layers))
        others = [
            name for name in source["params"] if name.startswith(("conv", "bn")) and name not in variables["params"]
        ]
        if others and "features" in source_layers:
            raise UserError(f"the source has {', '.join(others)} too, and the network has not: other features")
    frozen_layers = model.layers_with_parameters(frozen)
    params = {layer: p for layer, p in variables["params"].items() if layer not in frozen_layers}
    if not params:
        raise ValueError("all layers are frozen; expected some that train")
    batch_stats = variables.get("batch_stats", {})
    return TrainState.create(
        apply_fn=model.apply,
        params=params,
        frozen_params={layer: variables["params"][layer] for layer in frozen_layers},
        batch_stats=batch_stats,
        ema=jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats}) if ema_decay else {},
        ema_decay=ema_decay,
        plateau=plateau.init(jnp.zeros((), jnp.float32)) if plateau else {},
        tx=optimizer,
    )


def _take_layers(variables: Mapping[str, Any], source: Mapping[str, Any], layers: list[str]) -> dict[str, Any]:
    """`variables`, with copies of the named layers of `source`: a step that donates the state leaves `source` alone."""
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
                problems.append(f"{layer} is {found or 'absent'} in the source; expected {expected or 'none'}")
    if problems:
        raise UserError("\n".join(problems))
    return taken


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    key: jax.Array,
    augment: Callable[[jax.Array, jax.Array], jax.Array] = lambda key, images: images,
    label_smoothing: float = 0.0,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of the optimizer on one batch. Pure; jit it with `augment` bound and the state donated.

    Args:
      state: the state before the step.
      batch: `image` (N, H, W, C) and `label` (N,) integers below the number of classes.
      key: the run's key; augmentation and dropout use what is folded from it and the state's step.
      augment: from (key, batch["image"]) to normalised float images.
      label_smoothing: the part of each label that is spread over all classes, as PyTorch's cross entropy does.

    Returns:
      The state after the step, and of the batch before it the mean `loss` (cross entropy with the smoothed labels) and
      `accuracy`, scalars, and `finite`, a boolean for each of `checked_tensors`. Where one of those is not finite, the
      state stays as it was but for its step, with which the next one takes other random numbers.
    """
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    images = augment(augment_key, batch["image"])

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        logits, updates = state.apply_fn(
            state.variables_with(params),
            images,
            train=True,
            frozen=tuple(state.frozen_params),
            rngs={"dropout": dropout_key},
            mutable=["batch_stats"],
        )
        if label_smoothing:
            labels = optax.smooth_labels(jax.nn.one_hot(batch["label"], logits.shape[-1]), label_smoothing)
            loss = optax.softmax_cross_entropy(logits, labels).mean()
        else:
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return loss, (logits, updates.get("batch_stats", {}))

    loss, pull_back, (logits, batch_stats) = jax.vjp(loss_fn, state.params, has_aux=True)
    gradients = _head_last(lambda cotangent: pull_back(cotangent)[0], loss)
    accuracy = (logits.argmax(-1) == batch["label"]).mean()
    checked = _in_order(images, batch_stats, loss, gradients)
    finite = jnp.stack([_is_finite(tensor) for tensor in checked.values()])
    state = state.apply_gradients(grads=gradients, finite=finite.all(), batch_stats=batch_stats)
    return state, {"loss": loss, "accuracy": accuracy, "finite": finite}


def _head_last(pull_back: Callable[[jax.Array], dict[str, Any]], loss: jax.Array) -> dict[str, Any]:
    """The gradients of the loss; on one CPU device those of the dense layers when all the others are there.

    They are nine tenths of a VGG's gradients and made of little, so they need not lie beside the activations: a step of
    VGG-16 at 224x224 takes 0.4 GiB less. What reaches these layers is computed a second time, a hundredth of the step.
    """
    gradients = pull_back(jnp.ones_like(loss))
    if jax.device_count() > 1:
        return gradients  # or what they send to each other would be sent twice
    others = {layer: gradient for layer, gradient in gradients.items() if not layer.startswith("fc")}

    def when_they_are_there() -> jax.Array:
        # XLA removes what is always 1. Where one of them is not finite, the step is undone, whatever this is.
        finite = functools.reduce(jnp.logical_and, map(_is_finite, jax.tree.leaves(others)), jnp.array(True))
        return jnp.where(finite, 1.0, 2.0).astype(loss.dtype)

    one = jax.lax.platform_dependent(cpu=when_they_are_there, default=lambda: jnp.ones_like(loss))
    return pull_back(one) | others


def _is_finite(tensor: jax.Array) -> jax.Array:
    """Whether all of it is.

    XLA:CPU stores `isfinite` of each element: 54 ms and 98 MiB for fc6's gradient; the product takes 15 ms (one core).
    """
    rows = jnp.atleast_1d(tensor).reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    return jnp.isfinite(jnp.dot(rows, jnp.zeros(rows.shape[1], rows.dtype))).all()  # 0 times inf is not a number


def checked_tensors(state: TrainState) -> list[str]:
    """The names of what has to be finite in a step: gradients/conv1_1/kernel. In the order in which it is computed."""
    return list(_in_order(None, state.batch_stats, None, state.params))


def _in_order(images: Any, batch_stats: Any, loss: Any, gradients: Any) -> dict[str, Any]:
    """The tensors by name, the statistics from conv1_1 on (then bn1_1, ..., fc8), the gradients from fc8."""

    def layers(kind: str, tree: Any) -> list[tuple[str, Any]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        leaves.sort(key=lambda leaf: (re.sub(r"\D", "", leaf[0][0].key), leaf[0][0].key.startswith("bn")))
        return [(f"{kind}/{jax.tree_util.keystr(path, simple=True, separator='/')}", leaf) for path, leaf in leaves]

    return {
        "images": images,
        **dict(layers("batch_stats", batch_stats)),
        "loss": loss,
        **dict(reversed(layers("gradients", gradients))),
    }


def compiler_options() -> dict[str, Any] | None:
    """Return options for `jax.jit` of the steps: on a CPU, order the operations so that they need the least memory.

    XLA:CPU's own order computes much of what the backward pass can compute itself in the forward pass, and keeps it.
    Evaluation by VGG-16 with batch norm at 32x32, batch 512, goes from 841 to 329 MiB.
    """
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if jax.default_backend() == "cpu" else None


def eval_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    normalize: Callable[[jax.Array], jax.Array] = lambda images: images,
    flip: bool = False,
) -> dict[str, jax.Array]:
    """Sums over one batch: of the `loss`, of the `correct` predictions and of the `count` of examples.

    Evaluates the moving averages of a state that has them.

    Args:
      state: the state to evaluate.
      batch: `image`, `label` as for `train_step`, and `weight` (N,): 1, or 0 for an example that does not count.
      normalize: from batch["image"] to normalised float images.
      flip: averages the logits of each image and its mirror image.
    """
    images = normalize(batch["image"])
    views = images[:, None] if not flip else jnp.stack([images, images[:, :, ::-1]], 1)
    # Both views in one pass, side by side, so that each device keeps its examples: two passes take twice as long to
    # compile, and XLA:CPU keeps the maps of both (VGG-16 with batch norm at 32x32, batch 512: 805 MiB instead of 657).
    logits = state.apply_fn(state.evaluated_variables, views.reshape(-1, *images.shape[1:]), train=False)
    logits = logits.reshape(*views.shape[:2], -1).mean(1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    correct = logits.argmax(-1) == batch["label"]
    weight = batch["weight"]
    return {"loss": (losses * weight).sum(), "correct": (correct * weight).sum(), "count": weight.sum()}
