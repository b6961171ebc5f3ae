"""Checkpoints of a run, saved by Orbax and verified by checksums."""

import contextlib
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vgg_jax.console import log, note
from vgg_jax.errors import UserError, first_line
from vgg_jax.training.abandoned_reads import silence_abandoned_reads
from vgg_jax.training.agreement import exchange, meet
from vgg_jax.training.checksums import describe, named_leaves, not_finite, problem_of, read_metadata, read_sums
from vgg_jax.training.host_copy import HostCopy, local_parts
from vgg_jax.training.manager import Save, make_handler, open_manager
from vgg_jax.training.state import TrainState


class Checkpoints:
    """The directory of a run's checkpoints: the two latest and the one with the best evaluation.

    A checkpoint holds everything that changes in a run: step, parameters (frozen ones too), running statistics, states
    of the optimizer and of a plateau schedule, exponential moving averages, and averages that are not reported yet. The
    order of the data and all random numbers follow from the seed and the step. Saves run in the background.
    """

    def __init__(self, directory: str) -> None:
        """Examine the checkpoints in the directory, which may be missing. This changes nothing on disk.

        Raises:
          UserError: if there are checkpoints and all of them are damaged.
        """
        self._directory = os.path.abspath(directory)
        problems = {step: _metadata_problem(self._path(step)) for step in saved_steps(self._directory)}
        self._damaged = {step: problem for step, problem in problems.items() if problem}
        if problems and len(self._damaged) == len(problems):
            raise _all_corrupt(self._directory, self._damaged)
        self._latest_step = max(problems.keys() - self._damaged.keys(), default=None)
        self._is_open = False
        self._saving = False  # whether the outcome of a save is still unknown
        self._host_copy = HostCopy()
        self._handler = make_handler()

    def open(self) -> None:
        """Prepare the directory for saves; the first save does so too.

        Make the directory if it is missing, move damaged checkpoints to its neighbor `checkpoints-corrupt`, log the
        reason of each, and delete the remains of a killed save.
        """
        _ = self._manager

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        self._set_aside({step: f"is damaged: {problem}" for step, problem in self._damaged.items()})
        self._is_open = True
        return open_manager(self._directory, handler=self._handler)

    @property
    def latest_step(self) -> int | None:
        """Return the step of the newest checkpoint that is not known to be damaged; None if there is none."""
        return self._manager.latest_step() if self._is_open else self._latest_step

    @property
    def accumulates(self) -> bool:
        """Return whether the newest checkpoint holds accumulated gradients."""
        names = read_metadata(self._path(self.latest_step))["shapes"]
        return any(name.startswith("opt_state/acc_grads/") for name in names)

    def save(self, state: TrainState, metrics: Mapping[str, float | int] | None, progress: Any = None) -> None:
        """Start to save `state`, unless its step is saved already or one of its arrays is not finite.

        Args:
          state: the state to save.
          metrics: the evaluation of the state, whose `accuracy` (or `rmse`) selects the best checkpoint; None if there
            was no evaluation. Metrics that are not finite do not count.
          progress: further JSON values that `restore` returns.

        Raises:
          UserError: if this save or the one before has failed, for example because the disk is full.
        """
        self.open()
        step = int(state.step)
        if step == self.latest_step:
            return
        self.check(wait=True)  # the last save reads the host copy that this save overwrites
        # `TrainState.create` of Flax starts with an int as the step.
        tree = jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, int) else leaf, _arrays(state))
        shapes = {name: list(leaf.shape) for name, leaf in named_leaves(tree).items()}
        if jax.process_count() == 1:
            tree = self._host_copy.update(tree)
            parts = [part for name, leaf in named_leaves(tree).items() for part in local_parts(name, leaf)]
        else:  # Orbax copies what each process writes; this copies what each process hashes
            parts = self._host_copy.update_parts(named_leaves(tree))
        learned = [part for part in parts if not part.name.startswith("plateau/")]  # a plateau starts at inf
        if bad := min((names[0] for names in exchange(not_finite(learned)) if names), default=None):
            log(f"checkpoint of step {step} not saved: {bad} is not finite")
            return
        if metrics and not np.isfinite(list(metrics.values())).all():
            metrics = None
        with self._names_failure():
            if not os.path.isdir(self._directory):
                raise FileNotFoundError("the directory is gone")
            metadata = describe(shapes, metrics, progress)
            self._manager.save(step, args=Save(tree, parts=parts), metrics=metrics, custom_metadata=metadata)
            self._saving = True

    def check(self, wait: bool = False) -> None:
        """Raise UserError if a save in the background has failed; with `wait`, block until the save finishes."""
        if jax.process_count() > 1:
            self._await_processes(wait)
        if self._saving and (wait or not self._manager.is_saving_in_progress()):
            self._saving = False
            with self._names_failure():
                self._manager.wait_until_finished()  # raises errors that `check_for_errors` of the manager misses

    def _await_processes(self, wait: bool) -> None:
        """Raise UserError if this process has failed to save; with `wait`, block until all processes have saved."""
        while True:
            if self._handler.failure:
                with self._names_failure():
                    raise self._handler.failure
            if not (wait and self._saving and self._manager.is_saving_in_progress()):
                return
            time.sleep(0.01)

    def restore(self, state: TrainState) -> tuple[TrainState, Any]:
        """Return `state` with the arrays of the newest intact checkpoint, and the progress saved with them.

        This changes nothing on disk. Call it before `open`, which moves damaged checkpoints.

        Args:
          state: a state of arrays, or of `jax.ShapeDtypeStruct` with shardings: the devices of each array.

        Raises:
          UserError: if no checkpoint is intact, or it belongs to another network or optimizer.
        """
        tree = _arrays(state)
        self._check_shapes(tree)
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

        def read(step: int) -> Any:
            path = os.path.join(self._path(step), "default")
            return checkpointer.restore(path, args=ocp.args.PyTreeRestore(target, restore_args=arguments))

        try:
            arrays, step, corrupt = _newest_whole(self._directory, saved_steps(self._directory), read)
        except UserError:
            self._check_dtypes(tree, checkpointer)  # arrays of another dtype fail their checksums too
            self._check_structure()
            raise
        self._damaged |= corrupt
        self._latest_step = step
        return state.replace(**arrays), read_metadata(self._path(step))["progress"]

    def reject_from(self, step: int, reason: str) -> int | None:
        """Move the checkpoints of this and later steps to `checkpoints-corrupt`; return the latest remaining step."""
        with self._names_failure():
            self._manager.wait_until_finished()
        self._set_aside({s: reason for s in saved_steps(self._directory) if s >= step})
        self._manager.reload()
        return self.latest_step

    def close(self) -> None:
        """Wait until every save is complete.

        Raises:
          UserError: if one has failed.
        """
        self.check(wait=True)
        with self._names_failure():
            self._manager.wait_until_finished()
        self._manager.close()

    def _path(self, step: int | None) -> str:
        return os.path.join(self._directory, str(step))

    def _check_shapes(self, tree: Any) -> None:
        saved = read_metadata(self._path(self.latest_step))["shapes"]
        self._compare(saved, {name: list(np.shape(leaf)) for name, leaf in named_leaves(tree).items()})

    def _check_dtypes(self, tree: Any, checkpointer: ocp.Checkpointer) -> None:
        path = os.path.join(self._path(self.latest_step), "default")
        try:
            saved = checkpointer.metadata(path).item_metadata.tree
        except Exception:  # of many kinds; the metadata of the arrays are damaged too
            return
        found, expected = ({name: str(leaf.dtype) for name, leaf in named_leaves(t).items()} for t in (saved, tree))
        self._compare(found, expected)

    def _check_structure(self) -> None:
        """Raise UserError if a checkpoint is intact: then it is of an optimizer whose state has another structure."""
        try:
            read_latest(self._directory)
        except UserError:
            return
        raise UserError(
            f"the checkpoints in {self._directory} are intact, but belong to an optimizer of another configuration; "
            "use the configuration of the run, or choose another --workdir"
        )

    def _compare(self, saved: dict[str, Any], expected: dict[str, Any]) -> None:
        if saved != expected:
            name = min(name for name in saved.keys() | expected.keys() if saved.get(name) != expected.get(name))
            raise UserError(
                f"the checkpoints in {self._directory} belong to another network or optimizer: {name} is "
                f"{saved.get(name, 'missing')}, expected {expected.get(name, 'none')}; choose another --workdir"
            )

    def _set_aside(self, steps: dict[int, str]) -> None:
        """Move checkpoints, each with its reason, in the first process; the others wait."""
        for step, reason in steps.items():
            aside = os.path.join(f"{self._directory}-corrupt", str(step))
            log(f"checkpoint of step {step} {reason}; moved to {aside}")
            if jax.process_index() == 0:
                os.makedirs(os.path.dirname(aside), exist_ok=True)
                while os.path.exists(aside):
                    aside += "-again"
                os.rename(self._path(step), aside)
        if steps:
            meet()

    @contextlib.contextmanager
    def _names_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of many kinds, from Orbax, TensorStore and the system
            saved = ", ".join(map(str, saved_steps(self._directory))) or "none"
            raise UserError(
                f"cannot save a checkpoint in {self._directory}: {first_line(error)}; intact checkpoints: step {saved};"
                " free disk space or fix the problem, then rerun the same command to resume from the latest"
            ) from error


def read_latest(directory: str) -> dict[str, Any]:
    """Return the arrays of the newest intact checkpoint, on the host, whatever devices they were saved from.

    Raises:
      UserError: if no checkpoint is intact.
    """
    read = functools.partial(_read_on_host, directory)
    arrays, _, corrupt = _newest_whole(directory, saved_steps(directory), read)
    for step, problem in corrupt.items():
        note(f"checkpoint of step {step} in {directory} is damaged: {problem}; using an older one")
    on_host: dict[str, Any] = jax.tree.map(np.asarray, arrays)
    return on_host


def read_step(directory: str, step: int) -> dict[str, Any]:
    """Return the arrays of the checkpoint of a step, likewise.

    Raises:
      UserError: if the checkpoint is damaged.
    """
    arrays, problem = _read_whole(directory, step, functools.partial(_read_on_host, directory))
    if problem:
        raise UserError(f"checkpoint of step {step} in {directory} is damaged: {problem}; choose another step")
    on_host: dict[str, Any] = jax.tree.map(np.asarray, arrays)
    return on_host


def _read_on_host(directory: str, step: int) -> Any:
    checkpointer = ocp.StandardCheckpointer()
    path = os.path.join(os.path.abspath(directory), str(step), "default")
    saved = checkpointer.metadata(path).item_metadata.tree
    return checkpointer.restore(path, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved))


def saved_steps(directory: str | os.PathLike[str]) -> list[int]:
    """Return the steps of the checkpoints in the directory in rising order; none if it is missing."""
    return sorted(int(name) for name in os.listdir(directory) if name.isdigit()) if os.path.isdir(directory) else []


def _newest_whole(directory: str, steps: Iterable[int], read: Callable[[int], Any]) -> tuple[Any, int, dict[int, str]]:
    """Return the result of `read` for the newest step with correct checksums, that step, and the problems of newer."""
    corrupt: dict[int, str] = {}
    for step in sorted(steps, reverse=True):
        arrays, problem = _read_whole(directory, step, read)
        if not problem:
            return arrays, step, corrupt
        corrupt[step] = problem
    raise _all_corrupt(directory, corrupt)


def _read_whole(directory: str, step: int, read: Callable[[int], Any]) -> tuple[Any, str | None]:
    """Return the result of `read` for a step and None, or the problem of its checkpoint in any process."""
    path = os.path.join(os.path.abspath(directory), str(step))
    if problem := _in_any_process(_metadata_problem(path)):
        return None, problem
    silence_abandoned_reads()
    arrays, problem = None, None
    try:
        arrays = read(step)
    except Exception as error:  # of many kinds, from Orbax, TensorStore and the system
        problem = f"it cannot be read: {first_line(error)}"
    if problem := _in_any_process(problem):
        return None, problem
    return arrays, problem_of(path, arrays)


def _in_any_process(problem: str | None) -> str | None:
    """Return the first process's problem, so that all processes turn to the same checkpoint."""
    return next((found for found in exchange(problem) if found), None)


def _metadata_problem(path: str) -> str | None:
    """Return the problem of the files that describe a checkpoint; None if they are intact.

    Each checkpoint is opened in a directory of its own, because one unreadable checkpoint keeps Orbax from opening the
    whole directory.
    """
    try:
        directory = tempfile.TemporaryDirectory()
    except OSError as error:
        raise UserError(f"cannot make a temporary directory: {error}; free disk space, or set TMPDIR") from None
    with directory as alone:
        os.symlink(path, os.path.join(alone, os.path.basename(path)))
        try:
            with open_manager(alone, read_only=True) as manager:
                step = int(os.path.basename(path))
                manager.metadata(step)
                if manager.metrics(step) != read_metadata(path)["metrics"]:
                    raise ValueError("the evaluation differs from the saved one")
            read_sums(path)
        except Exception as error:  # of many kinds, from Orbax, TensorStore and the system
            return f"its metadata cannot be read: {type(error).__name__}: {first_line(error)}"
    return None


def _all_corrupt(directory: str, corrupt: dict[int, str]) -> UserError:
    problems = "; ".join(f"step {step}: {problem}" for step, problem in sorted(corrupt.items(), reverse=True))
    return UserError(
        f"every checkpoint in {directory} is damaged ({problems}); expected an intact one; restore it from a backup, "
        "or start a new run with another --workdir"
    )


def _arrays(state: TrainState) -> dict[str, Any]:
    names = ["step", "params", "batch_stats", "opt_state"]
    names += [name for name in ("frozen_params", "plateau", "ema") if getattr(state, name)]
    return {name: getattr(state, name) for name in names}
