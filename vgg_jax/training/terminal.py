"""What a terminal shows of a run: a bar for each epoch of training and evaluation, and a line that remains of each."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vgg_jax.console import Bar, counted, duration, log, on_terminal, progress_line

Metrics = Mapping[str, float | int]
COLUMNS = 80  # width of the lines that remain
HIDDEN = (
    "learning_rate",
    "count",
    "model_flops_per_second",
)  # metrics without a place on the terminal; `metrics.jsonl` has them


class RunDisplay:
    """The display of a run on a terminal. It shows nothing if standard output or standard error is not a terminal."""

    def __init__(self, start_step: int, num_steps: int, steps_per_epoch: int) -> None:
        """Start the clock; arguments as those of `MetricWriter`."""
        self.visible = on_terminal()
        self._num_steps, self._steps_per_epoch = num_steps, steps_per_epoch
        self._bar: Bar | None = None
        self._latest: list[str] = []  # of the last report
        self._reports: list[tuple[int, float, Metrics]] = []  # steps, seconds and metrics of this epoch's reports
        self._evaluation_seconds = math.inf
        self.restart(start_step)

    def restart(self, step: int) -> None:
        """Start the clock of the time left anew at this step."""
        self._begin, self._begin_step = time.monotonic(), step

    def step(self, step: int) -> None:
        """Show that a step is done; print a line after the last one of an epoch."""
        if not self.visible:
            return
        in_epoch = (step - 1) % self._steps_per_epoch + 1
        left = self._left(step)
        facts = [f"{in_epoch}/{self._steps_per_epoch}", *self._latest, left]
        description = f"train epoch {self._epoch(step)}"
        self._bar = self._bar or Bar(description, self._steps_per_epoch, "steps", in_epoch - 1)
        self._bar.description = description
        self._bar.update(in_epoch - self._bar.count, facts)
        if in_epoch == self._steps_per_epoch or step == self._num_steps:
            self._bar.draw(facts)
            self._print("train", step, [*_facts(self._epoch_means()), left])
            self._reports.clear()

    def report(self, steps: int, seconds: float, metrics: Metrics) -> None:
        """Show the averages of the last steps from now on."""
        self._latest = _facts(metrics)
        self._reports.append((steps, seconds, metrics))

    def memory(self, sizes: Mapping[str, int]) -> None:
        """Print a line with the memory of the run in GiB."""
        log("  ".join(["memory", *(f"{name} {size / 2**30:.2f}" for name, size in sizes.items())]) + " GiB")

    def evaluating(self, step: int, batches: Iterable[Any], total: int) -> Iterator[Any]:
        """Yield the batches of an evaluation and show a bar in the place of the training's."""
        self.close()
        begin = time.monotonic()
        yield from counted(batches, total, f"eval epoch {self._epoch(step)}", "batches", hidden=not self.visible)
        self._evaluation_seconds = time.monotonic() - begin

    def evaluation(self, step: int, metrics: Metrics) -> None:
        """Print a line with the result of an evaluation."""
        count = metrics.get("count", 0)
        rate = {"images_per_second": count / self._evaluation_seconds} if count else {}
        self._print("eval", step, [*_facts({**metrics, **rate}), self._left(step)])

    def close(self) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.close()
        self._bar = None

    def _epoch_means(self) -> Metrics:
        """Return the means of this epoch's reports; none if there was no report."""
        if not self._reports:
            return {}
        total = sum(steps for steps, _, _ in self._reports)
        means = {name: value for name, value in self._reports[-1][2].items() if name not in HIDDEN}
        for name in means.keys() - {"skipped", "images_per_second", "mfu"}:
            means[name] = sum(steps * metrics[name] for steps, _, metrics in self._reports) / total
        seconds = sum(seconds for _, seconds, _ in self._reports)
        images = sum(seconds * metrics["images_per_second"] for _, seconds, metrics in self._reports)
        if "mfu" in means:
            means["mfu"] = sum(seconds * metrics["mfu"] for _, seconds, metrics in self._reports) / max(seconds, 1e-9)
        return {**means, "images_per_second": images / max(seconds, 1e-9)}

    def _left(self, step: int) -> str:
        seconds = (time.monotonic() - self._begin) / max(step - self._begin_step, 1) * (self._num_steps - step)
        return f"ETA {duration(seconds)}"

    def _epoch(self, step: int) -> str:
        """Return the epoch of a step and the number of epochs."""
        return f"{math.ceil(step / self._steps_per_epoch)}/{math.ceil(self._num_steps / self._steps_per_epoch)}"

    def _print(self, split: str, step: int, facts: list[str]) -> None:
        log(progress_line(f"{split:5s} epoch {self._epoch(step)}", facts, None, COLUMNS))


def _facts(metrics: Metrics) -> list[str]:
    """Return short texts for the metrics, images per second last."""
    facts = [_short(name, value) for name, value in metrics.items() if name not in (*HIDDEN, "images_per_second")]
    if "images_per_second" in metrics:
        rate = metrics["images_per_second"]
        facts.append(f"{rate:,.0f} img/s" if rate >= 10 else f"{rate:.2f} img/s")
    return facts


def _short(name: str, value: float | int) -> str:
    if name == "accuracy":
        return f"acc {value:.1%}"
    if name == "mfu":
        return f"mfu {value:.1%}"
    if isinstance(value, int):
        return f"{name} {value:,}"
    return f"{name} {value:.2f}" if abs(value) >= 1 else f"{name} {value:.3f}"
