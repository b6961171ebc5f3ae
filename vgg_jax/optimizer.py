"""SGD with momentum and Adam, as PyTorch's, and the schedules of the learning rate."""

import optax
import optax.contrib

from vgg_jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps_per_epoch: int, num_steps: int) -> optax.Schedule:
    """The learning rate as a function of the step: linear warm-up, then constant, step or cosine."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    match config.schedule:
        case "step":
            steps = [round(epoch * steps_per_epoch) - warmup for epoch in config.step_epochs]
            schedule = optax.piecewise_constant_schedule(config.learning_rate, dict.fromkeys(steps, config.step_factor))
        case "cosine":
            schedule = optax.cosine_decay_schedule(config.learning_rate, num_steps - warmup)
        case _:
            schedule = optax.constant_schedule(config.learning_rate)
    if not warmup:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), schedule], [warmup])


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


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """`torch.optim.SGD` or `Adam`: the decay of every parameter joins the (clipped) gradient before the moments."""
    if config.name == "adam":
        rule = optax.adam(schedule)
    else:
        rule = optax.sgd(schedule, config.momentum or None, nesterov=config.nesterov)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.add_decayed_weights(config.weight_decay),
        rule,
    )
