"""SGD with momentum and Adam, as PyTorch's, and the schedules of the learning rate."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from vgg_jax.config import Config, OptimizerConfig


def make_schedule(config: Config, num_examples: int) -> optax.Schedule:
    """The learning rate as a function of the update: linear warm-up, then constant, step or cosine.

    Args:
      config: the run's.
      num_examples: of an epoch, before its last, incomplete batch is left out.
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
    """optax's reduction of the rate on a plateau, where the schedule is that.

    Its `value` is the error of an evaluation, its state's `scale` what the rate is multiplied by.

    The paper decreases it by a factor of 10 when the accuracy on the validation set stops improving.
    """
    if config.schedule != "plateau":
        return None
    return optax.contrib.reduce_on_plateau(
        factor=config.step_factor,
        patience=config.plateau_patience,
        rtol=1e-6,  # any improvement: optax wants it positive
        min_scale=config.step_factor**config.plateau_reductions,
    )


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, accumulation_steps: int = 1
) -> optax.GradientTransformation:
    """`torch.optim.SGD` or `Adam`: the decay joins the (clipped) gradient before the moments.

    Args:
      config: which of them, and their constants.
      schedule: the learning rate as a function of the update.
      accumulation_steps: an update follows so many calls, by the mean of their gradients; the others give zeros.
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
    """The state of `momentum`: of each parameter the decaying sum of its gradients."""

    trace: Any


def momentum(decay: float, nesterov: bool = False) -> optax.GradientTransformationExtraArgs:
    """`optax.trace`, except that its state stays as it is where the further argument `finite` of `update` is False.

    The updates are made of the state's new value alone. So a step that donates its state needs no copy of it, while
    with `optax.trace` XLA:CPU copies the state and the parameters, each of which is made of the old values of both:
    VGG-16's take 1 GiB.
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
