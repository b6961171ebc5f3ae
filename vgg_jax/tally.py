"""What the steps since the last report came to, and which of them were skipped."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vgg_jax.errors import UserError
from vgg_jax.reporting import say

Metrics = Mapping[str, jax.Array]  # of `training.train_step`


class NotFiniteError(UserError):
    """Too many steps in a row were skipped: from `first_step` on, in which `tensor` was the first not to be finite."""

    def __init__(self, steps: int, first_step: int, tensor: str) -> None:
        super().__init__(f"{steps} steps in a row were skipped, from step {first_step} on: {tensor} was not finite")
        self.first_step, self.tensor = first_step, tensor


class Tally:
    """Adds up the metrics of steps; what is not reported yet goes into checkpoints, and a run that goes on reports it.

    It reads what a step gives when the next one is under way, so that the devices need not wait. What reads raises
    NotFiniteError where too many in a row were skipped.
    """

    def __init__(self, tensors: Sequence[str], max_skipped: int, saved: Mapping[str, Any] | None = None) -> None:
        """Starts anew, or goes on.

        Args:
          tensors: `training.checked_tensors`.
          max_skipped: so many skipped steps in a row are too many.
          saved: `state` of the tally to go on with.
        """
        self._tensors, self._max_skipped = tensors, max_skipped
        self._unread: collections.deque[tuple[int, Metrics]] = collections.deque()
        self._sums = {"loss": 0.0, "accuracy": 0.0, "steps": 0, **(saved or {}).get("sums", {})}
        self.skipped: int = (saved or {}).get("skipped", 0)
        self.in_a_row: int = (saved or {}).get("in_a_row", 0)
        self._row: tuple[int, str] = tuple((saved or {}).get("row", (0, "")))  # its first step and tensor

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step, and reads those of the one before."""
        self._unread.append((step, metrics))
        if len(self._unread) > 1:
            self._read()

    def report(self) -> dict[str, float]:
        """The mean `loss` and `accuracy` of the steps since the last call; NaN where all were skipped."""
        self._read_all()
        steps = self._sums.pop("steps")
        means = {name: value / steps if steps else math.nan for name, value in self._sums.items()}
        self._sums = {"loss": 0.0, "accuracy": 0.0, "steps": 0}
        return means

    def state(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
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
        step, metrics = self._unread.popleft()
        values = jax.device_get(dict(metrics))
        if values["finite"].all():
            for name in ("loss", "accuracy"):
                self._sums[name] += float(values[name])
            self._sums["steps"] += 1
            self.in_a_row = 0
            return
        tensor = self._tensors[int(np.argmin(values["finite"]))]
        say(f"step {step} is skipped: {tensor} is not finite")
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row == 1:
            self._row = (step, tensor)
        if self.in_a_row >= self._max_skipped:
            raise NotFiniteError(self.in_a_row, *self._row)
