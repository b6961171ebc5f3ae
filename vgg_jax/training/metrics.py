"""Averages of the metrics of steps, and the steps that are skipped because they are not finite."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vgg_jax.console import log
from vgg_jax.errors import UserError

Metrics = Mapping[str, jax.Array]  # as returned by `step.train_step`


def evaluation_error(evaluation: Mapping[str, float | int]) -> float:
    """Return what a better network has less of: 1 - accuracy, or the rmse of a regression."""
    return evaluation["rmse"] if "rmse" in evaluation else 1 - evaluation["accuracy"]


def split_off_classes(evaluation: dict[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Remove the accuracy of each class from an evaluation, and return it by name; empty if there is none."""
    accuracies = evaluation.pop("class_accuracy", ())
    return dict(zip(names, accuracies, strict=True)) if len(accuracies) else {}


class NotFiniteError(UserError):
    """Too many steps in a row were skipped.

    Attributes:
      first_step: the first of these steps.
      tensor: the first tensor of that step that was not finite.
    """

    def __init__(self, steps: int, first_step: int, tensor: str) -> None:
        super().__init__(f"{steps} steps in a row were skipped, from step {first_step}: {tensor} was not finite")
        self.first_step, self.tensor = first_step, tensor


class MetricAverages:
    """Running averages of the metrics of steps since the last report.

    The metrics of a step are read when later steps are under way, so that the devices need not wait. Every method that
    reads metrics raises NotFiniteError if too many steps in a row were skipped. `state` goes into checkpoints, so that
    a resumed run also reports the steps that were taken before.
    """

    def __init__(
        self,
        tensors: Sequence[str],
        max_skipped: int,
        saved: Mapping[str, Any] | None = None,
        metric: str = "accuracy",
        queue: int = 1,
    ) -> None:
        """Start with no steps, or with those of `saved`.

        Args:
          tensors: the names of `step.checked_tensors`.
          max_skipped: the number of skipped steps in a row that raises NotFiniteError.
          saved: a result of `state`.
          metric: the metric beside the loss: accuracy, or rmse, which follows from a loss of squared errors.
          queue: the number of results of `add` that may remain unread.
        """
        self._metric = metric
        self._tensors, self._max_skipped, self._queue = tensors, max_skipped, queue
        self._unread: collections.deque[tuple[int, Metrics]] = collections.deque()
        sums = (saved or {}).get("sums", {})
        self._sums = {name: sums.get(name, zero) for name, zero in self._zeros().items()}
        self.skipped: int = (saved or {}).get("skipped", 0)
        self.in_a_row: int = (saved or {}).get("in_a_row", 0)
        self._row: tuple[int, str] = tuple((saved or {}).get("row", (0, "")))  # its first step and tensor

    def add(self, step: int, metrics: Metrics) -> None:
        """Add the metrics of a step, or of several steps; read the oldest metrics if too many are unread.

        Args:
          step: the step, or the last one of several.
          metrics: the metrics of `step.train_step`; those of several steps have one more axis in front.
        """
        if self._queue > 1:
            for array in metrics.values():
                array.copy_to_host_async()
        self._unread.append((step, metrics))
        if len(self._unread) > self._queue:
            self._read()

    def report(self) -> dict[str, float]:
        """Return mean `loss` and `accuracy` (or `rmse`) of the steps since the last call; NaN if all were skipped."""
        self._read_all()
        steps = self._sums.pop("steps")
        means = {name: value / steps if steps else math.nan for name, value in self._sums.items()}
        self._sums = self._zeros()
        return means if self._metric == "accuracy" else {**means, "rmse": math.sqrt(means["loss"])}

    def _zeros(self) -> dict[str, float]:
        return {"loss": 0.0, **({"accuracy": 0.0} if self._metric == "accuracy" else {}), "steps": 0}

    @property
    def loss(self) -> float | None:
        """Return the mean loss of the steps since the last report; None if there are none."""
        self._read_all()
        return self._sums["loss"] / self._sums["steps"] if self._sums["steps"] else None

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as JSON values."""
        self._read_all()
        return {
            "sums": self._sums,
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "row": list(self._row),
        }

    def _read_all(self) -> None:
        while self._unread:
            self._read()

    def _read(self) -> None:
        last, metrics = self._unread.popleft()
        values = jax.device_get(dict(metrics))
        if values["finite"].ndim == 1:
            self._count(last, values)
            return
        steps = len(values["finite"])
        for i in range(steps):
            self._count(last - steps + 1 + i, {name: array[i] for name, array in values.items()})

    def _count(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a step to the sums or to those skipped."""
        if values["finite"].all():
            for name in self._sums.keys() - {"steps"}:
                self._sums[name] += float(values[name])
            self._sums["steps"] += 1
            self.in_a_row = 0
            return
        tensor = self._tensors[int(np.argmin(values["finite"]))]
        log(f"skipped step {step}: {tensor} is not finite")
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row == 1:
            self._row = (step, tensor)
        if self.in_a_row >= self._max_skipped:
            raise NotFiniteError(self.in_a_row, *self._row)
