"""Checkpoints of a run, by Orbax: the latest and the best; where one is damaged, the newest that is whole."""

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from vgg_jax.errors import UserError, first_line
from vgg_jax.integrity import describe, difference, named_arrays, named_leaves, read_metadata
from vgg_jax.memory import HostCopy
from vgg_jax.reporting import say
from vgg_jax.training import TrainState


class Checkpoints:
    """The directory of a run's checkpoints; keeps the two latest and the one of the best accuracy.

    A checkpoint holds everything that changes in a run: step, parameters (with the frozen ones), running statistics,
    optimizer state, that of a plateau schedule, moving averages, and what is not reported yet. The order of the data
    and every random number follow from the seed and the step. Saves happen in the background.
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
        self._saving = False  # a save whose outcome is not known yet
        self._host_copy = HostCopy()

    def open(self) -> None:
        """Prepare the directory for saves; the first save does so too.

        Make it if it is missing, move damaged checkpoints to its neighbor `checkpoints-corrupt`, each with a line that
        says why, and delete what a killed save left.
        """
        _ = self._manager

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        self._set_aside({step: f"is damaged: {problem}" for step, problem in self._damaged.items()})
        self._is_open = True
        return _open(self._directory)

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint that is not known to be damaged; None if there is none."""
        return self._manager.latest_step() if self._is_open else self._latest_step

    def save(self, state: TrainState, metrics: dict[str, float] | None, progress: Any = None) -> None:
        """Starts to save `state`, unless its step is saved already, or an array of it is not finite.

        Args:
          state: what is saved.
          metrics: its evaluation, with the `accuracy` by which it may be the best; None where there was none. One that
            is not finite does not count.
          progress: what else `restore` is to give back, as JSON has it.

        Raises:
          UserError: where this save, or the one before, has failed, as on a full disk.
        """
        self.open()
        step = int(state.step)
        if step == self.latest_step:
            return
        self.check(wait=True)  # the last save reads the copy that this one overwrites
        tree = _arrays(state)
        if jax.process_count() == 1:
            tree = self._host_copy.update(tree)
        arrays = named_arrays(tree)
        learned = [name for name in arrays if not name.startswith("plateau/")]  # which begins with infinity
        if bad := [name for name in learned if not np.isfinite(arrays[name]).all()]:
            say(f"step {step} is not saved: {bad[0]} is not finite")
            return
        if metrics and not np.isfinite(list(metrics.values())).all():
            metrics = None
        with self._names_failure():
            if not os.path.isdir(self._directory):
                raise FileNotFoundError("the directory is gone")
            metadata = describe(arrays, metrics, progress)
            self._manager.save(step, args=ocp.args.PyTreeSave(tree), metrics=metrics, custom_metadata=metadata)
            self._saving = True

    def check(self, wait: bool = False) -> None:
        """Raises UserError where a save in the background has failed; with `wait`, once it is complete or has."""
        if self._saving and (wait or not self._manager.is_saving_in_progress()):
            self._saving = False
            with self._names_failure():
                self._manager.wait_until_finished()  # raises, where the manager's check_for_errors does not

    def restore(self, state: TrainState) -> tuple[TrainState, Any]:
        """Return `state` with the arrays of the newest intact checkpoint, and the progress saved with them.

        This changes nothing on disk: `open` moves the newer, damaged checkpoints. Call it before that.

        Args:
          state: a state of arrays, or of `jax.ShapeDtypeStruct` with shardings. It gives the devices of each array.

        Raises:
          UserError: if no checkpoint is intact, or it is one of another network or optimizer.
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
            self._check_dtypes(tree, checkpointer)  # arrays of another dtype fail their checksums
            raise
        self._damaged |= corrupt
        self._latest_step = step
        return state.replace(**arrays), read_metadata(self._path(step))["progress"]

    def reject_from(self, step: int, reason: str) -> int | None:
        """Moves the checkpoints from this step on to `checkpoints-corrupt`; returns the latest that is left."""
        with self._names_failure():
            self._manager.wait_until_finished()
        self._set_aside({s: reason for s in saved_steps(self._directory) if s >= step})
        self._manager.reload()
        return self.latest_step

    def close(self) -> None:
        """Waits until every save is complete.

        Raises:
          UserError: where one has failed.
        """
        with self._names_failure():
            self._manager.wait_until_finished()
        self._manager.close()

    def _path(self, step: int | None) -> str:
        return os.path.join(self._directory, str(step))

    def _check_shapes(self, tree: Any) -> None:
        saved = read_metadata(self._path(self.latest_step))["shapes"]
        self._compare(saved, {name: list(leaf.shape) for name, leaf in named_leaves(tree).items()})

    def _check_dtypes(self, tree: Any, checkpointer: ocp.Checkpointer) -> None:
        path = os.path.join(self._path(self.latest_step), "default")
        try:
            saved = checkpointer.metadata(path).item_metadata.tree
        except Exception:  # of many kinds: this is damaged too
            return
        found, expected = ({name: str(leaf.dtype) for name, leaf in named_leaves(t).items()} for t in (saved, tree))
        self._compare(found, expected)

    def _compare(self, saved: dict[str, Any], expected: dict[str, Any]) -> None:
        if saved != expected:
            name = min(name for name in saved.keys() | expected.keys() if saved.get(name) != expected.get(name))
            raise UserError(
                f"the checkpoints in {self._directory} are of another network or optimizer: {name} is "
                f"{saved.get(name, 'absent')} there, expected {expected.get(name, 'none')}; take another --workdir"
            )

    def _set_aside(self, steps: dict[int, str]) -> None:
        """Moves checkpoints, each for a reason; the first process does, and the others wait."""
        for step, reason in steps.items():
            aside = os.path.join(f"{self._directory}-corrupt", str(step))
            say(f"the checkpoint of step {step} {reason}; it is kept in {aside}")
            if jax.process_index() == 0:
                os.makedirs(os.path.dirname(aside), exist_ok=True)
                while os.path.exists(aside):
                    aside += "-again"
                os.rename(self._path(step), aside)
        if steps and jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints are set aside")

    @contextlib.contextmanager
    def _names_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of many kinds, from Orbax, TensorStore and the system
            saved = ", ".join(map(str, saved_steps(self._directory))) or "none"
            raise UserError(
                f"cannot save a checkpoint in {self._directory}: {first_line(error)}; whole are those of step {saved}; "
                "make room, or mend what is wrong, and the same command goes on from the latest"
            ) from error


def read_latest(directory: str) -> dict[str, Any]:
    """The arrays, on the host, of the newest checkpoint that is whole, whatever devices they were saved from.

    Raises:
      UserError: where none is whole.
    """
    checkpointer = ocp.StandardCheckpointer()

    def read(step: int) -> Any:
        path = os.path.join(os.path.abspath(directory), str(step), "default")
        saved = checkpointer.metadata(path).item_metadata.tree
        return checkpointer.restore(path, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved))

    arrays, _, corrupt = _newest_whole(directory, saved_steps(directory), read)
    for step, problem in corrupt.items():
        say(f"the checkpoint of step {step} in {directory} is damaged: {problem}; an older one is used")
    return jax.tree.map(np.asarray, arrays)


def saved_steps(directory: str) -> list[int]:
    """The steps of the checkpoints in the directory, which may be missing; the latest last."""
    return sorted(int(name) for name in os.listdir(directory) if name.isdigit()) if os.path.isdir(directory) else []


def _newest_whole(directory: str, steps: Iterable[int], read: Callable[[int], Any]) -> tuple[Any, int, dict[int, str]]:
    """What `read` gives of the newest step whose checksums are right, that step, and what is wrong with newer ones."""
    corrupt: dict[int, str] = {}
    for step in sorted(steps, reverse=True):
        path = os.path.join(os.path.abspath(directory), str(step))
        problem, arrays = _metadata_problem(path), None
        if not problem:
            try:
                arrays = read(step)
            except Exception as error:  # of many kinds, from Orbax, TensorStore and the system
                problem = f"it cannot be read: {first_line(error)}"
        if not problem:
            problem = difference(read_metadata(path)["sha256"], named_arrays(arrays))
        if not problem:
            return arrays, step, corrupt
        corrupt[step] = problem
    raise _all_corrupt(directory, corrupt)


def _metadata_problem(path: str) -> str | None:
    """What is wrong with the files that describe a checkpoint, if anything is.

    It is opened alone, for one that Orbax cannot read keeps it from opening the whole directory.
    """
    with tempfile.TemporaryDirectory() as alone:
        os.symlink(path, os.path.join(alone, os.path.basename(path)))
        try:
            with _open(alone, read_only=True) as manager:
                step = int(os.path.basename(path))
                manager.metadata(step)
                if manager.metrics(step) != read_metadata(path)["metrics"]:
                    raise ValueError("the evaluation is not the one that was saved")
        except Exception as error:  # of many kinds, from Orbax, TensorStore and the system
            return f"its metadata cannot be read: {type(error).__name__}: {first_line(error)}"
    return None


def _open(directory: str, read_only: bool = False) -> ocp.CheckpointManager:
    best = policies.BestN(
        get_metric_fn=lambda metrics: metrics["accuracy"], n=1, keep_checkpoints_without_metrics=False
    )
    options = ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics["accuracy"],  # else the metrics are forgotten when the run stops
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), best]),
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
    )
    # Compression takes more of the processors than everything else of a save, and makes it a tenth smaller.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=_array_handlers())
    return ocp.CheckpointManager(directory, item_handlers=handler, options=options)


def _array_handlers() -> Any:
    """Return Orbax's handlers of arrays, without a second copy of those on the host: `HostCopy` is one already."""
    types = ocp.type_handlers
    return types.create_type_handler_registry(
        (np.ndarray, types.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, types.get_type_handler(jax.Array)),
    )


def _all_corrupt(directory: str, corrupt: dict[int, str]) -> UserError:
    problems = "; ".join(f"step {step}: {problem}" for step, problem in sorted(corrupt.items(), reverse=True))
    return UserError(
        f"every checkpoint in {directory} is damaged ({problems}); bring back a whole one from a copy, or "
        "start anew with another --workdir"
    )


def _arrays(state: TrainState) -> dict[str, Any]:
    names = ["step", "params", "batch_stats", "opt_state"]
    names += [name for name in ("frozen_params", "plateau", "ema") if getattr(state, name)]
    return {name: getattr(state, name) for name in names}
