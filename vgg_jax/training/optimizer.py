"""SGD with momentum and Adam as in PyTorch, and the schedules of the learning rate."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from vgg_jax.config import Config, OptimizerConfig


def make_schedule(config: Config, num_examples: int) -> optax.Schedule:
    """Return the learning rate as a function of the update: linear warm-up, then constant, step or cosine.

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
    config: OptimizerConfig, schedule: optax.Schedule, accumulation_steps: int = 1
) -> optax.GradientTransformation:
    """Return the equivalent of `torch.optim.SGD` or `Adam`: weight decay is added to the (clipped) gradient.

    Args:
      config: the optimizer and its constants.
      schedule: the learning rate as a function of the update.
      accumulation_steps: the micro-batches of an update. The last one updates by the mean of their gradients; the
        updates of the others are zeros.
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
    )
    if accumulation_steps == 1:
        return optimizer
    return optax.MultiSteps(optimizer, accumulation_steps, accumulator_dtype=None).gradient_transformation()


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
        kept = jax.lax.optimization_barrier(kept)
        return add(gradients, kept) if nesterov else kept, MomentumState(kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _are_kernels(params: Any) -> Any:
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)
