"""SGD with momentum and Adam as in PyTorch, and the schedules of the learning rate."""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from vgg_jax.config import Config, OptimizerConfig, rates_of
from vgg_jax.model import VGG


def make_schedule(config: Config, num_examples: int) -> optax.Schedule:
    """Return the learning rate as a function of the update: linear warm-up, then one of `config.SCHEDULES`.

    `rate.make_rate` gives the same rate as a number.

    Args:
      config: the configuration of the run.
      num_examples: the examples of the training split. The last, incomplete batch of an epoch is dropped.
    """
    optimizer, rate = config.optimizer, config.learning_rate
    updates_per_epoch, num_updates = (
        steps // config.accumulation_steps
        for steps in (config.steps_per_epoch(num_examples), config.num_steps(num_examples))
    )
    warmup = round(optimizer.warmup_epochs * updates_per_epoch)
    match optimizer.schedule:
        case "step":
            updates = [round(epoch * updates_per_epoch) - warmup for epoch in optimizer.step_epochs]
            schedule = optax.piecewise_constant_schedule(rate, dict.fromkeys(updates, optimizer.step_factor))
        case "cosine":
            schedule = optax.cosine_decay_schedule(rate, max(1, num_updates - warmup))
        case "linear":
            schedule = optax.linear_schedule(rate, 0.0, max(1, num_updates - warmup))
        case _:
            schedule = optax.constant_schedule(rate)
    if not warmup:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), schedule], [warmup])


def make_plateau(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs | None:
    """Return optax's reduction of the learning rate on a plateau; None for the other schedules.

    Call its `update` after each evaluation with the error as `value`. The field `scale` of its state is the factor on
    the learning rate. The paper divides the rate by 10 when the accuracy on the validation set stops improving.
    """
    if config.schedule != "plateau":
        return None
    return optax.contrib.reduce_on_plateau(
        factor=config.step_factor,
        patience=config.plateau_patience,
        rtol=1e-6,  # any improvement counts; optax requires a positive value
        min_scale=config.step_factor**config.plateau_reductions,
    )


def make_optimizer(
    config: OptimizerConfig,
    schedule: optax.Schedule,
    accumulation_steps: int = 1,
    rates: Mapping[str, float] = MappingProxyType({}),
) -> optax.GradientTransformation:
    """Return the equivalent of `torch.optim.SGD` or `Adam`: weight decay is added to the (clipped) gradient.

    Args:
      config: the optimizer and its constants.
      schedule: the learning rate as a function of the update.
      accumulation_steps: the micro-batches of an update. The last one updates by the mean of their gradients; the
        updates of the others are zeros.
      rates: factors of the learning rate by layer, a result of `layer_rates`, like parameter groups of PyTorch.
    """
    if config.name == "adam":
        rule = optax.adam(schedule)
    else:
        rule = optax.chain(
            momentum(config.momentum, config.nesterov) if config.momentum else optax.identity(),
            optax.scale_by_learning_rate(schedule),
        )
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.add_decayed_weights(config.weight_decay, mask=_are_kernels if config.decayed == "kernels" else None),
        rule,
        *([scale_by_layer(rates)] if rates else []),
    )
    if accumulation_steps == 1:
        return optimizer
    return optax.MultiSteps(optimizer, accumulation_steps, accumulator_dtype=None).gradient_transformation()


def layer_rates(text: str, model: VGG) -> dict[str, float]:
    """Return the factor of the learning rate of each layer that `config.optimizer.rates` names.

    If two names have a layer in common, the one with fewer layers counts: conv5_1, then stage5, then features.

    Args:
      text: the value of the field.
      model: the network.

    Raises:
      ValueError: if a name is unknown.
    """
    groups = [(model.layers_with_parameters((name,)), rate) for name, rate in (rates_of(text) or {}).items()]
    groups.sort(key=lambda group: -len(group[0]))
    return {layer: rate for layers, rate in groups for layer in layers}


def scale_by_layer(rates: Mapping[str, float]) -> optax.GradientTransformation:
    """Return the transformation that multiplies the updates of the layers in `rates`; others stay unchanged."""

    def update(updates: Any, params: Any) -> Any:
        return {
            layer: jax.tree.map(lambda u, rate=rates[layer]: rate * u, tree) if layer in rates else tree
            for layer, tree in updates.items()
        }

    return optax.stateless(update)


def schedule_count(opt_state: Any) -> int:
    """Return the update whose learning rate comes next, from the state of an optimizer of `make_optimizer`."""
    leaves = jax.tree.leaves(opt_state, is_leaf=_is_schedule)
    (count,) = (int(jax.device_get(node.count)) for node in leaves if _is_schedule(node))
    return count


def accumulated_steps(opt_state: Any) -> int:
    """Return the micro-batches since the last update."""
    return int(jax.device_get(opt_state.mini_step)) if isinstance(opt_state, optax.MultiStepsState) else 0


def at_update(opt_state: Any, update: int, shardings: Any) -> Any:
    """Return the state of an optimizer at another update of its schedule, without accumulated gradients.

    Everything else stays: the momentum, the moments of Adam, and the count of their updates for its bias correction.

    Args:
      opt_state: the state of an optimizer of `make_optimizer`.
      update: the update whose learning rate comes next.
      shardings: the shardings of `opt_state`.
    """

    def at(node: Any) -> Any:
        count = np.asarray(update, node.count.dtype) if _is_schedule(node) else None
        return node if count is None else node._replace(count=jax.device_put(count, node.count.sharding))

    opt_state = jax.tree.map(at, opt_state, is_leaf=_is_schedule)
    if not isinstance(opt_state, optax.MultiStepsState):
        return opt_state
    names = ("mini_step", "acc_grads")
    zeros = jax.jit(
        functools.partial(jax.tree.map, jnp.zeros_like), out_shardings=tuple(getattr(shardings, name) for name in names)
    )(tuple(getattr(opt_state, name) for name in names))
    return opt_state._replace(**dict(zip(names, zeros, strict=True)))


def with_accumulation(opt_state: Any, params: Any, step: Any, shardings: Any = None) -> optax.MultiStepsState:
    """Return the state of an optimizer with accumulation of gradients, from that of the same one without.

    Args:
      opt_state: the state of an optimizer of `make_optimizer` without accumulation.
      params: the parameters that train.
      step: the updates so far.
      shardings: the shardings of the result.
    """

    def wrapped(opt_state: Any, params: Any, step: Any) -> optax.MultiStepsState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.MultiStepsState(jnp.zeros([], jnp.int32), jnp.asarray(step, jnp.int32), opt_state, zeros, ())

    state: optax.MultiStepsState = jax.jit(wrapped, out_shardings=shardings)(opt_state, params, step)
    return state


def _is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


class MomentumState(NamedTuple):
    """The state of `momentum`."""

    trace: Any  # the decaying sum of the gradients of each parameter


def momentum(decay: float, nesterov: bool = False) -> optax.GradientTransformationExtraArgs:
    """Return `optax.trace` whose `update` takes `finite` too: if it is False, the state stays unchanged.

    Updates depend only on the new state, so XLA can reuse the old buffers of a donated state; `optax.trace` forces a
    copy of the state and the parameters, because each depends on the old values of both (1 GiB for VGG-16 on a CPU).

    Args:
      decay: the momentum.
      nesterov: use Nesterov's momentum.
    """

    def init(params: Any) -> MomentumState:
        return MomentumState(jax.tree.map(jnp.zeros_like, params))

    def add(gradients: Any, trace: Any) -> Any:
        return jax.tree.map(lambda g, t: g + decay * t, gradients, trace)

    def update(
        gradients: Any, state: MomentumState, params: Any = None, *, finite: Any = True, **_: Any
    ) -> tuple[Any, MomentumState]:
        kept = jax.tree.map(functools.partial(jnp.where, finite), add(gradients, state.trace), state.trace)
        # The barrier keeps XLA:CPU from computing the new momentum twice. Accelerators fuse it with the update.
        kept = jax.lax.platform_dependent(kept, cpu=jax.lax.optimization_barrier, default=lambda kept: kept)
        return add(gradients, kept) if nesterov else kept, MomentumState(kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _are_kernels(params: Any) -> Any:
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)
