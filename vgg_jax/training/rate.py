"""The learning rate of an update as a Python number, without a program on the devices.

`optimizer.make_schedule` gives the same rate inside the training step, where optax computes it from the count of the
updates. A report or a checkpoint needs one number: evaluating optax's schedule for it would run a dozen small programs.
"""

import dataclasses

import numpy as np

from vgg_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Rate:
    """The learning rate as a function of the update: linear warm-up, then one of `config.SCHEDULES`."""

    kind: str  # constant, step, cosine, linear or plateau (without its reductions)
    rate: float  # after the warm-up
    warmup: int  # updates of the warm-up
    decay: int  # updates of the cosine or the line, at least 1
    drops: tuple[int, ...]  # updates after the warm-up at which the step schedule multiplies the rate by `factor`
    factor: float

    def __call__(self, update: int) -> float:
        """Return the rate of an update, counted from 0, in the float32 arithmetic of optax's schedules."""
        if self.kind in ("constant", "plateau") and not self.warmup:
            return self.rate
        one, rate = np.float32(1), np.float32(self.rate)
        if update < self.warmup:
            return float(-rate * (one - np.float32(update) / np.float32(self.warmup)) + rate)
        after = update - self.warmup
        if self.kind == "cosine":
            angle = np.float32(np.pi) * np.float32(min(after, self.decay)) / np.float32(self.decay)
            return float(rate * (np.float32(0.5) * (one + np.float32(np.cos(np.float64(angle))))))
        if self.kind == "linear":
            return float(rate * (one - np.float32(min(after, self.decay)) / np.float32(self.decay)))
        if self.kind == "step":
            for drop in self.drops:
                rate = rate if after < drop else np.float32(self.factor) * rate
        return float(rate)


def make_rate(config: Config, num_examples: int) -> Rate:
    """Return the learning rate as a function of the update.

    Args:
      config: the configuration of the run.
      num_examples: the examples of the training split. The last, incomplete batch of an epoch is dropped.
    """
    optimizer = config.optimizer
    updates_per_epoch, num_updates = (
        steps // config.accumulation_steps
        for steps in (config.steps_per_epoch(num_examples), config.num_steps(num_examples))
    )
    warmup = round(optimizer.warmup_epochs * updates_per_epoch)
    return Rate(
        kind=optimizer.schedule,
        rate=config.learning_rate,
        warmup=warmup,
        decay=max(1, num_updates - warmup),
        # One factor for several epochs that round to the same update.
        drops=tuple(dict.fromkeys(round(epoch * updates_per_epoch) - warmup for epoch in optimizer.step_epochs)),
        factor=float(optimizer.step_factor),
    )
