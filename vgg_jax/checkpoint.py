"""Checkpoints of a run, by Orbax: the latest and the best, with a checksum for every array.

Orbax commits a checkpoint whole or not at all, but restores a damaged one without a word. So the SHA-256 of each array
is saved beside it and compared when it is read; where they differ, the newest checkpoint that is whole takes its place.
"""

import contextlib
import hashlib
import json
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
from vgg_jax.reporting import say
from vgg_jax.training import TrainState

METADATA = "_CHECKPOINT_METADATA"  # Orbax's file of a checkpoint, with our checksums in it


class Checkpoints:
    """The directory of a run's checkpoints; keeps the two latest and the one of the best accuracy.

    A checkpoint holds everything that changes in a run: step, parameters (with the frozen ones), running statistics,
    optimizer state, that of a plateau schedule, moving averages. The order of the data and every random number follow
    from the seed and the step. Saves happen in the background.
    """

    def __init__(self, directory: str) -> None:
        """Opens or makes the directory.

        Raises:
          UserError: where there are checkpoints, and none can be read.
        """
        self._directory = os.path.abspath(directory)
        problems = {step: _metadata_problem(self._path(step)) for step in saved_steps(self._directory)}
        self._corrupt = {step: problem for step, problem in problems.items() if problem}
        if problems and len(self._corrupt) == len(problems):
            raise _all_corrupt(self._directory, self._corrupt)
        self._set_aside()
        self._manager = _open(self._directory)

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, metrics: dict[str, float] | None) -> None:
        """Starts to save `state`, with its evaluation if there was one, unless its step is saved already.

        Raises:
          UserError: where this save, or the one before, has failed, as on a full disk.
        """
        step = int(state.step)
        if step == self.latest_step:
            return
        arrays = _arrays(state)
        args = ocp.args.StandardSave(arrays)
        with self._names_failure():
            self._manager.save(step, args=args, metrics=metrics, custom_metadata={"sha256": checksums(arrays)})

    def check(self) -> None:
        """Raises UserError where a save in the background has failed."""
        with self._names_failure():
            self._manager.check_for_errors()

    def restore(self, state: TrainState) -> TrainState:
        """`state` with the arrays of the newest checkpoint that is whole, laid over the devices as those of `state`.

        Newer ones are moved to the directory's neighbour `checkpoints-corrupt`, each with a line that says why.

        Raises:
          UserError: where no checkpoint is whole. Nothing is moved then.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays(state))

        def read(step: int) -> Any:
            return self._manager.restore(step, args=ocp.args.StandardRestore(target))

        arrays, self._corrupt = _newest_whole(self._directory, self._manager.all_steps(), read)
        self._set_aside()
        self._manager.reload()
        return state.replace(**arrays)

    def close(self) -> None:
        """Waits until every save is complete.

        Raises:
          UserError: where one has failed.
        """
        with self._names_failure():
            self._manager.wait_until_finished()
        self._manager.close()

    def _path(self, step: int) -> str:
        return os.path.join(self._directory, str(step))

    def _set_aside(self) -> None:
        """Moves the checkpoints that are corrupt; the first process does, and the others wait."""
        for step, problem in self._corrupt.items():
            aside = os.path.join(f"{self._directory}-corrupt", str(step))
            say(f"the checkpoint of step {step} is damaged: {problem}; it is kept in {aside}")
            if jax.process_index() == 0:
                os.makedirs(os.path.dirname(aside), exist_ok=True)
                while os.path.exists(aside):
                    aside += "-again"
                os.rename(self._path(step), aside)
        if self._corrupt and jax.process_count() > 1:
            multihost_utils.sync_global_devices("corrupt checkpoints are set aside")
        self._corrupt = {}

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

    arrays, corrupt = _newest_whole(directory, saved_steps(directory), read)
    for step, problem in corrupt.items():
        say(f"the checkpoint of step {step} in {directory} is damaged: {problem}; an older one is used")
    return jax.tree.map(np.asarray, arrays)


def saved_steps(directory: str) -> list[int]:
    """The steps of the checkpoints in the directory, which may be missing; the latest last."""
    return sorted(int(name) for name in os.listdir(directory) if name.isdigit()) if os.path.isdir(directory) else []


def checksums(arrays: Any) -> dict[str, str]:
    """The SHA-256 of each array of a tree, by its path: params/conv1_1/kernel."""

    def checksum(array: Any) -> str:
        if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
            array = multihost_utils.process_allgather(array, tiled=True)
        array = np.asarray(array)
        digest = hashlib.sha256(f"{array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
        return digest.hexdigest()

    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): checksum(leaf) for path, leaf in leaves}


def _newest_whole(directory: str, steps: Iterable[int], read: Callable[[int], Any]) -> tuple[Any, dict[int, str]]:
    """What `read` gives of the newest step whose checksums are right; and what is wrong with the newer ones."""
    corrupt: dict[int, str] = {}
    for step in sorted(steps, reverse=True):
        problem, arrays = _metadata_problem(os.path.join(os.path.abspath(directory), str(step))), None
        if not problem:
            try:
                arrays = read(step)
            except Exception as error:  # of many kinds, from Orbax, TensorStore and the system
                problem = f"it cannot be read: {first_line(error)}"
        if not problem:
            problem = _checksum_problem(os.path.join(directory, str(step)), arrays)
        if not problem:
            return arrays, corrupt
        corrupt[step] = problem
    raise _all_corrupt(directory, corrupt)


def _checksum_problem(path: str, arrays: Any) -> str | None:
    with open(os.path.join(path, METADATA)) as file:
        saved = json.load(file)["custom_metadata"]["sha256"]
    found = checksums(arrays)
    wrong = [name for name in sorted(saved.keys() | found.keys()) if saved.get(name) != found.get(name)]
    return f"{', '.join(wrong[:3])} failed the checksum" if wrong else None


def _metadata_problem(path: str) -> str | None:
    """What is wrong with the files that describe a checkpoint, if anything is.

    It is opened alone, for one that Orbax cannot read keeps it from opening the whole directory.
    """
    with tempfile.TemporaryDirectory() as alone:
        os.symlink(path, os.path.join(alone, os.path.basename(path)))
        try:
            with _open(alone, read_only=True) as manager:
                step = int(os.path.basename(path))
                dict(manager.metadata(step).custom_metadata["sha256"])
                metrics = manager.metrics(step)
                if metrics is not None:
                    float(metrics["accuracy"])
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
    return ocp.CheckpointManager(directory, options=options)


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
