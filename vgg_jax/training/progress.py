"""The progress of a run: its position in the data and in the schedule, also after a change of the batch size.

A run counts the steps that it has taken. The count never falls: it numbers checkpoints and log lines, and random
numbers follow from it. The position says where the run is in its epochs, in steps of the present size. Both are equal
until a resumed run changes its batch size, its micro-batches or its number of training examples. Checkpoints store the
position in examples.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import optax

from vgg_jax.config import Config
from vgg_jax.errors import UserError
from vgg_jax.training.blocks import gaps
from vgg_jax.training.blocks import lengths as block_lengths
from vgg_jax.training.checkpoints import Checkpoints
from vgg_jax.training.optimizer import accumulated_steps, at_update, schedule_count, with_accumulation
from vgg_jax.training.rate import make_rate
from vgg_jax.training.run import Run
from vgg_jax.training.run_directory import read_config
from vgg_jax.training.sharding import with_sharding
from vgg_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Progress:
    """The steps and examples of a run so far; the defaults are those of a new run."""

    run: Run
    start: int = 0  # steps taken before this process
    offset: int = 0  # position minus steps taken
    schedule_offset: int = 0  # position in the schedule, in steps, minus steps taken and not skipped
    examples: int = 0  # examples seen before this process

    @property
    def last_step(self) -> int:
        """Return the step that ends the run."""
        return self.run.num_steps - self.offset

    def epoch(self, step: int) -> float:
        """Return the epochs completed after a step."""
        return (step + self.offset) / self.run.steps_per_epoch

    def is_due(self, step: int, every: int) -> bool:
        """Return whether something that happens after each `every` positions happens after this step."""
        return (step + self.offset) % every == 0

    def blocks(self, length: int, bounds: Iterable[int] = ()) -> Iterator[range]:
        """Yield the steps of each program: blocks of `length`, and single steps where something happens before.

        Args:
          length: the number of steps of a block.
          bounds: steps that must be the last of their block, besides those after which something is due.
        """
        first = self.start + 1
        for steps in block_lengths(self._gaps(bounds), length):
            yield range(first, first + steps)
            first += steps

    def lengths(self, length: int, bounds: Iterable[int] = ()) -> set[int]:
        """Return the numbers of steps of the programs that `blocks` yields."""
        if length == 1:
            return {1}
        whole = {length for gap in self._gaps(bounds) if gap >= length}
        return whole | {1 for gap in self._gaps(bounds) if gap % length}

    def _gaps(self, bounds: Iterable[int]) -> Iterator[int]:
        positions = [step + self.offset for step in bounds]
        return gaps(self.start + self.offset, self.run.num_steps, self.run.periods, positions)

    def is_first_evaluation(self, step: int) -> bool:
        """Return whether the evaluation after this step is the first one after an epoch and the warm-up."""
        epochs = max(1.0, self.run.config.optimizer.warmup_epochs)
        return self.epoch(step - self.run.eval_every) < epochs <= self.epoch(step)

    def learning_rate(self, step: int, skipped: int, scale: float) -> float:
        """Return the learning rate of a step.

        Args:
          step: the step, from 1.
          skipped: the steps skipped so far.
          scale: the factor of a plateau schedule.
        """
        update = (step - 1 - skipped + self.schedule_offset) // self.run.config.accumulation_steps
        return self.run.rate(update) * scale

    def saved(self, step: int, skipped: int, scale: float) -> dict[str, Any]:
        """Return the progress after a step as JSON values, for the checkpoint of this step."""
        config = self.run.config
        epoch, steps = divmod(step + self.offset, self.run.steps_per_epoch)
        return {
            "epoch": epoch,
            "epoch_examples": steps * config.step_size,
            "examples": self.examples + (step - self.start) * config.step_size,
            "offset": self.offset,
            "learning_rate": self.learning_rate(step + 1, skipped, scale),
            **_sizes(config, len(self.run.train_split)),
        }


def restore(run: Run, checkpoints: Checkpoints, workdir: str) -> tuple[TrainState, Progress, dict[str, Any], str]:
    """Return the newest intact checkpoint as a run needs it.

    Args:
      run: the run, built from the present configuration.
      checkpoints: the checkpoints of the run, at least one. They stay unchanged.
      workdir: the directory of the run.

    Returns:
      The state, the progress, the averages that are not reported yet (a result of `MetricAverages.state`), and a line
      that says what has changed since the checkpoint, which is empty if nothing has.

    Raises:
      UserError: as `Checkpoints.restore`.
    """
    target: TrainState = jax.tree.map(with_sharding, run.shapes, run.shardings)
    accumulates = run.config.accumulation_steps > 1
    if checkpoints.accumulates == accumulates:
        state, saved = checkpoints.restore(target)
    elif accumulates:
        state, saved = checkpoints.restore(target.replace(opt_state=target.opt_state.inner_opt_state))
        opt_state = with_accumulation(state.opt_state, state.params, state.step, run.shardings.opt_state)
        state = state.replace(opt_state=opt_state)
    else:
        like_saved = jax.eval_shape(with_accumulation, target.opt_state, target.params, target.step)
        shardings = run.shardings
        like_saved = jax.tree.map(
            with_sharding,
            like_saved,
            optax.MultiStepsState(shardings.step, shardings.step, shardings.opt_state, shardings.params, ()),
        )
        state, saved = checkpoints.restore(target.replace(opt_state=like_saved))
        state = state.replace(opt_state=state.opt_state.inner_opt_state)
    state, progress, changes = resume(run, state, saved or {}, workdir)
    return state, progress, saved or {}, changes


def resume(run: Run, state: TrainState, saved: dict[str, Any], workdir: str) -> tuple[TrainState, Progress, str]:
    """Return the state and the progress with which a run resumes, and a line that says what has changed.

    If the batch size, the micro-batches or the number of training examples have changed, the run resumes at the same
    epoch and the same batch of it, rounded down. The schedule of the learning rate resumes there too. The gradients of
    an incomplete batch are dropped.

    Args:
      run: the run, built from the present configuration.
      state: the state of the checkpoint.
      saved: the progress in the checkpoint.
      workdir: the directory of the run. Its `config.json` is used for checkpoints that do not state their position.

    Returns:
      The state, the progress and the line, which is empty if nothing has changed.
    """
    config, start, skipped = run.config, int(state.step), saved.get("skipped", 0)
    scale = float(jax.device_get(state.rate_scale))
    position = saved.get("position") or _position_by_config(run, state, workdir, scale)
    sizes = _sizes(config, len(run.train_split))
    offset = position["offset"]
    if any(position[name] != sizes[name] for name in ("batch_size", "accumulation_steps", "num_examples")):
        batch = position["epoch_examples"] // config.batch_size
        batch = min(batch, run.steps_per_epoch // config.accumulation_steps)
        now = position["epoch"] * run.steps_per_epoch + batch * config.accumulation_steps
        offset = now - start
        opt_state = at_update(state.opt_state, now // config.accumulation_steps, run.shardings.opt_state)
        state = state.replace(opt_state=opt_state)
    taken = schedule_count(state.opt_state) * config.accumulation_steps + accumulated_steps(state.opt_state)
    progress = Progress(run, start, offset, taken - start + skipped, position["examples"])
    return state, progress, _changes(progress, position, sizes, progress.learning_rate(start + 1, skipped, scale))


def _sizes(config: Config, num_examples: int) -> dict[str, Any]:
    """Return the values that steps, epochs and the schedule depend on."""
    return {
        "batch_size": config.batch_size,
        "accumulation_steps": config.accumulation_steps,
        "num_epochs": config.num_epochs,
        "num_examples": num_examples,
    }


def _position_by_config(run: Run, state: TrainState, workdir: str, scale: float) -> dict[str, Any]:
    """Return the position of a checkpoint that does not state it, from the configuration that the run has had."""
    try:
        config = read_config(workdir)
    except UserError:  # another version wrote it
        config = run.config
    n, step = len(run.train_split), int(state.step)
    epoch, steps = divmod(step, config.steps_per_epoch(n))
    rate = make_rate(config, n)(schedule_count(state.opt_state)) * scale
    return {
        "epoch": epoch,
        "epoch_examples": steps * config.step_size,
        "examples": step * config.step_size,
        "offset": 0,
        "learning_rate": rate,
        **_sizes(config, n),
    }


def _changes(progress: Progress, before: dict[str, Any], sizes: dict[str, Any], rate: float) -> str:
    """Return the line about everything that has changed since the checkpoint; an empty one if nothing has."""
    names = {
        "batch_size": "batch size",
        "accumulation_steps": "micro-batches",
        "num_epochs": "epochs",
        "num_examples": "training examples",
    }
    changes = [
        f"{name} {before[field]:,.9g} -> {sizes[field]:,.9g}"
        for field, name in names.items()
        if before[field] != sizes[field]
    ]
    if abs(rate - before["learning_rate"]) > 1e-6 * max(rate, before["learning_rate"]):
        changes.append(f"learning rate {before['learning_rate']:.4g} -> {rate:.4g}")
    if not changes:
        return ""
    where = f"epoch {progress.epoch(progress.start):.2f} of {sizes['num_epochs']:g} ({before['examples']:,} examples)"
    return f"resuming at {where}, step {progress.start} of {progress.last_step}: {'; '.join(changes)}"
