"""Trackers: they receive every report of a run, and write it where they please.

`JsonLines` and `TensorBoard` belong to each run. Pass others to `loop.train_and_evaluate(..., trackers=[...])`.
"""

import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from vgg_jax.errors import require

Metrics = Mapping[str, float | int]


@runtime_checkable
class Tracker(Protocol):
    """What a run calls on a tracker, in the first process only. An exception of a tracker ends the run."""

    def start(self, config: Mapping[str, Any], step: int) -> None:
        """Start or resume; a resumed run reports the steps after `step` a second time.

        Args:
          config: the fields of the configuration by name, such as optimizer.learning_rate, as JSON values.
          step: the steps taken before; 0 for a new run.
        """

    def record(self, kind: str, step: int, epoch: float, metrics: Metrics) -> None:
        """Record a report.

        Args:
          kind: train, eval, classes (the accuracy of each class, named accuracy/CLASS) or memory (bytes, at step 0).
          step: the steps taken so far.
          epoch: the epochs so far.
          metrics: numbers by name, such as loss and accuracy. They may be NaN or infinite.
        """

    def close(self) -> None:
        """End, also after an error; a second call does nothing."""


class JsonLines:
    """The tracker that writes each report as a line of `metrics.jsonl`."""

    def __init__(self, path: str) -> None:
        """Write nothing yet; `path` is that of the file."""
        self._path = path

    def start(self, config: Mapping[str, Any], step: int) -> None:
        """Open the file, and drop the lines after `step`; if `step` is 0, drop all."""
        kept = [line for line in read_metrics(self._path) if line["step"] <= step] if step else []
        with open(self._path + ".partial", "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        os.replace(self._path + ".partial", self._path)
        self.file = open(self._path, "a", buffering=1)  # noqa: SIM115 - `close` closes it

    def record(self, kind: str, step: int, epoch: float, metrics: Metrics) -> None:
        """Write a line. JSON has no NaN and no infinity: they become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.file.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **finite}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class TensorBoard:
    """The tracker that writes each number as a point of the tag KIND/NAME."""

    def __init__(self, directory: str) -> None:
        """Write nothing yet; `directory` gets the events."""
        self._directory = directory

    def start(self, config: Mapping[str, Any], step: int) -> None:
        """Open the events, and purge those after `step`.

        Raises:
          UserError: if tensorboardX is not installed.
        """
        self._events = _summary_writer()(self._directory, purge_step=step + 1)

    def record(self, kind: str, step: int, epoch: float, metrics: Metrics) -> None:
        """Write a point for each number."""
        for name, value in metrics.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Close the events."""
        self._events.close()


def _summary_writer() -> Any:
    """Return the writer class of tensorboardX, imported without torch.

    tensorboardX imports torch if it is installed, which takes seconds and has no use here.
    """
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # type: ignore[assignment]  # None makes the import of torch fail
    try:
        return require("tensorboardX", "train").SummaryWriter
    finally:
        if absent:
            del sys.modules["torch"]


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the lines of a `metrics.jsonl`, none if the file is missing; skip a last line cut short by a crash.

    Args:
      path: the file.

    Returns:
      For each line a dict of kind, step, epoch and the metrics. NaN and infinity are None.
    """
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.endswith("\n")]
