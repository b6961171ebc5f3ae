"""Reports of a run: progress on the terminal, `metrics.jsonl`, TensorBoard events and `curves.png`."""

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from vgg_jax.console import duration, log
from vgg_jax.data.loader import Loader
from vgg_jax.errors import UserError, require
from vgg_jax.look import picture
from vgg_jax.training.terminal import RunDisplay
from vgg_jax.training.trackers import JsonLines, Metrics, TensorBoard, Tracker
from vgg_jax.training.trackers import read_metrics as read_metrics

LOWEST = 3  # classes of a log line


class MetricWriter:
    """The writer of a run's metrics.

    A terminal shows what `terminal.RunDisplay` draws; other outputs get one plain line a report. Every report also goes
    to the trackers.
    """

    def __init__(
        self,
        workdir: str,
        start_step: int,
        num_steps: int,
        steps_per_epoch: int,
        offset: int = 0,
        flops_per_image: int = 0,
        peak: float = 0.0,
        trackers: Sequence[Tracker] = (),
        config: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Start the trackers; those of the run drop what follows `start_step`, which a resumed run repeats.

        Args:
          workdir: the directory of the run.
          start_step: the steps taken before; 0 for a new run.
          num_steps: the last step of the run.
          steps_per_epoch: the steps of an epoch.
          offset: the steps of the epochs minus the steps taken; not 0 after a change of the batch size.
          flops_per_image: the operations of a training step for one image; 0 reports no model FLOP/s.
          peak: the operations per second that all devices could do; 0 reports no MFU.
          trackers: trackers besides those of `metrics.jsonl` and TensorBoard.
          config: the configuration as a tracker takes it.

        Raises:
          UserError: if a file cannot be written.
        """
        self._path = os.path.join(workdir, "metrics.jsonl")
        self._num_steps, self._steps_per_epoch, self._offset = num_steps, steps_per_epoch, offset
        self._flops_per_image, self._peak = flops_per_image, peak
        self.trackers: list[Tracker] = [JsonLines(self._path), TensorBoard(workdir)]
        self.trackers += trackers
        for tracker in self.trackers:
            with self._names_failure(tracker):
                tracker.start(config, start_step)
        self._display = RunDisplay(start_step + offset, num_steps + offset, steps_per_epoch)
        self._start_step = start_step
        self._clock_start = self._last = (time.perf_counter(), start_step)

    def train(self, step: int, batch_size: int, metrics: Metrics) -> None:
        """Report the mean `loss`, the `accuracy` or `rmse` and further metrics of the steps since the last call."""
        now = time.perf_counter()
        seconds, steps = now - self._last[0], step - self._last[1]
        self._last = (now, step)
        left = (now - self._clock_start[0]) / max(step - self._clock_start[1], 1) * (self._num_steps - step)
        rate = batch_size * steps / max(seconds, 1e-9)
        metrics = {**metrics, "images_per_second": rate}
        if self._flops_per_image:
            metrics["model_flops_per_second"] = rate * self._flops_per_image
            if self._peak:
                metrics["mfu"] = metrics["model_flops_per_second"] / self._peak
        self._record("train", step, metrics)
        self._display.report(steps, seconds, metrics)
        if not self._display.visible:
            self._print("train", step, metrics, left)

    def step(self, step: int) -> None:
        """Show that a step is done, after its report if there is one."""
        self._display.step(step + self._offset)

    def memory(self, memory: dict[str, int]) -> None:
        """Report the result of `memory.run_memory` as that of the start; only a new run records it."""
        if self._start_step == 0:
            self._record("memory", 0, memory)
        if self._display.visible:
            self._display.memory(memory)
        else:
            self._print("memory", self._start_step, memory)

    def restart_clock(self, step: int) -> None:
        """Measure rates and the time left from now on, after this step."""
        self._clock_start = self._last = (time.perf_counter(), step)
        self._display.restart(step + self._offset)

    def eval_batches(self, step: int, loader: Loader, batch_size: int) -> Iterator[Any]:
        """Yield the loader's batches of an evaluation, and show its progress on a terminal."""
        total = loader.num_eval_batches(batch_size)
        return self._display.evaluating(step + self._offset, loader.eval_batches(batch_size), total)

    def evaluation(self, step: int, metrics: Metrics) -> None:
        """Report an evaluation; its time does not count as training."""
        self._record("eval", step, metrics)
        if self._display.visible:
            self._display.evaluation(step + self._offset, metrics)
        else:
            self._print("eval", step, metrics)
        self._last = (time.perf_counter(), step)

    def class_accuracy(self, step: int, accuracies: Mapping[str, float]) -> None:
        """Report the accuracy of each class in the evaluation of a step, NaN for a class without images."""
        self._record("classes", step, {f"accuracy/{name}": value for name, value in accuracies.items()})
        lowest = sorted((value, name) for name, value in accuracies.items() if not math.isnan(value))[:LOWEST]
        named = ", ".join(f"{name} {value:.1%}" for value, name in lowest)
        log(f"classes step {step}/{self._num_steps}  lowest accuracy: {named}")

    def close(self) -> None:
        """Close the files and draw `curves.png`."""
        self.release()
        draw_curves(os.path.dirname(self._path))

    def release(self) -> None:
        """Remove the bar and close the trackers, also after an error; a second call does nothing."""
        self._display.close()
        for tracker in reversed(self.trackers):
            with self._names_failure(tracker):
                tracker.close()

    def _record(self, kind: str, step: int, metrics: Metrics) -> None:
        epoch = round((step + self._offset) / self._steps_per_epoch, 4)
        for tracker in self.trackers:
            with self._names_failure(tracker):
                tracker.record(kind, step, epoch, metrics)

    @contextlib.contextmanager
    def _names_failure(self, tracker: Tracker) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not isinstance(tracker, JsonLines | TensorBoard):
                raise
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; free disk space or fix the problem, then rerun the same "
                "command to resume from the last checkpoint"
            ) from error

    def _print(self, kind: str, step: int, metrics: Metrics, seconds_left: float | None = None) -> None:
        epoch = (step + self._offset) / self._steps_per_epoch
        numbers = "  ".join(f"{name} {format_metric(name, value)}" for name, value in metrics.items())
        eta = f"  ETA {duration(seconds_left)}" if seconds_left is not None else ""
        log(f"{kind:6s}  step {step}/{self._num_steps}  epoch {epoch:.2f}  {numbers}{eta}")


class NoMetricWriter:
    """The writer of every process but the first, which writes for all of them."""

    def train(self, step: int, batch_size: int, metrics: Metrics) -> None:
        """Do nothing."""

    def step(self, step: int) -> None:
        """Do nothing."""

    def memory(self, memory: dict[str, int]) -> None:
        """Do nothing."""

    def restart_clock(self, step: int) -> None:
        """Do nothing."""

    def eval_batches(self, step: int, loader: Loader, batch_size: int) -> Iterator[Any]:
        """Return the loader's batches of an evaluation."""
        return loader.eval_batches(batch_size)

    def evaluation(self, step: int, metrics: Metrics) -> None:
        """Do nothing."""

    def class_accuracy(self, step: int, accuracies: Mapping[str, float]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def release(self) -> None:
        """Do nothing."""


def draw_curves(workdir: str) -> None:
    """Draw loss and accuracy (or rmse) of training and evaluation over the epochs into `curves.png`."""
    require("matplotlib", "train")
    lines = read_metrics(os.path.join(workdir, "metrics.jsonl"))
    with picture(os.path.join(workdir, "curves.png"), (10, 4)) as figure:
        _draw_metrics(figure, lines, os.path.basename(os.path.abspath(workdir)))


def _draw_metrics(figure: Any, lines: list[dict[str, Any]], name_of_run: str) -> None:
    """Draw loss and accuracy (or rmse) of the lines of metrics.jsonl side by side."""
    metric = "rmse" if any("rmse" in line for line in lines) else "accuracy"
    for axes, name in zip(figure.subplots(1, 2), ("loss", metric), strict=True):
        for kind, label, style in (("train", "training", "-"), ("eval", "evaluation", "o-")):
            points = [(line["epoch"], line[name]) for line in lines if line["kind"] == kind and line[name] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label)
        axes.set_xlabel("epoch")
        axes.set_ylabel(name if name == metric else "cross entropy" if metric == "accuracy" else "mean squared error")
        if name == "loss":
            axes.set_yscale("log")  # the loss falls by decades, and the first evaluations may be far above
        axes.grid()
        if axes.lines:
            axes.legend()
    evaluations = [line[metric] for line in lines if line["kind"] == "eval" and line[metric] is not None]
    if evaluations:
        figure.suptitle(f"{name_of_run}: final {metric} {format_metric(metric, evaluations[-1])}")


def format_metric(name: str, value: float | int) -> str:
    """Return the value of a metric as text."""
    match name:
        case "accuracy":
            return f"{value:.2%}"
        case "mfu":
            return f"{value:.1%}"
        case "model_flops_per_second":
            return f"{value / 1e12:.4g} TFLOP/s"
        case "images_per_second":
            return f"{value:.0f}"
        case "learning_rate":
            return f"{value:.3g}"
        case "peak" | "temporary" | "evaluation" | "resident":
            return f"{value / 2**30:.3f} GiB"
        case "loss" | "rmse":
            return f"{value:.4f}"
    return str(value)
