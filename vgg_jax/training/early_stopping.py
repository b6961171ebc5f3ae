"""Early stopping: a run ends when its evaluations no longer get better."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vgg_jax.config import Config


@dataclasses.dataclass
class EarlyStopping:
    """The best evaluation so far, and the evaluations since then. Checkpoints hold it, so a resumed run continues it.

    As in Keras, an evaluation is better if it exceeds the best one by more than `min_delta`, and the run ends after
    `patience` evaluations in a row that are not.
    """

    patience: int  # 0: the run never ends early
    min_delta: float
    metric: str  # accuracy, or rmse, which is better if it is smaller
    best: float | None = None
    best_step: int = 0
    waited: int = 0  # evaluations since the best one

    @classmethod
    def of_run(cls, config: Config, saved: Mapping[str, Any]) -> "EarlyStopping":
        """Return the state of a run at its start.

        Args:
          config: the configuration of the run.
          saved: the progress in its checkpoint, which holds a result of `state`; empty for a new run.
        """
        fields = saved.get("early_stopping", {})
        return cls(config.early_stopping_patience, config.early_stopping_min_delta, config.metric, **fields)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON values."""
        return {"early_stopping": {"best": self.best, "best_step": self.best_step, "waited": self.waited}}

    def update(self, step: int, evaluation: Mapping[str, float | int]) -> None:
        """Take an evaluation after a step into account."""
        sign = -1 if self.metric == "rmse" else 1
        value = evaluation[self.metric]
        if value == value and (self.best is None or sign * (value - self.best) > self.min_delta):  # not NaN
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1

    @property
    def is_over(self) -> bool:
        """Return whether the run ends."""
        return 0 < self.patience <= self.waited

    def line(self) -> str:
        """Return the reason for the end as text."""
        best = "no evaluation was finite" if self.best is None else f"best {self.metric} {self.best:.4f}"
        return f"stopped early: {best}, at step {self.best_step}, {self.waited} evaluations ago"
