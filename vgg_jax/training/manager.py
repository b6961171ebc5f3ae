"""Orbax's manager of a directory of checkpoints: which ones it keeps, and the checksums beside the arrays."""

import dataclasses
import inspect
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals

from vgg_jax.training.checksums import write_sums
from vgg_jax.training.host_copy import Part
from vgg_jax.training.metrics import evaluation_error


class Handler(ocp.PyTreeCheckpointHandler):  # type: ignore[misc]  # Orbax is not typed
    """Orbax's writer of a tree of arrays, which also writes their checksums before the checkpoint is complete.

    Orbax completes a checkpoint when all that `async_save` returns has ended, in all processes. So a process that is
    killed while it hashes leaves an incomplete checkpoint, and never one without checksums.
    """

    failure: Exception | None = None  # of a save in the background

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Start to write the arrays and, in another thread, to hash them and write the checksums."""
        parts = kwargs["args"].parts
        commits = await super().async_save(directory, *args, **kwargs)

        async def write() -> None:
            write_sums(directory.parent, parts)  # `directory` is `default`, beside our metadata

        commits = [*(commits or []), CommitFutureAwaitingContractedSignals(write(), name="checksums")]
        return [Commit(commit, self) for commit in commits]


class Commit:
    """A part of a save in the background that records its failure as soon as it fails.

    Orbax itself reports the failure of one of several processes only after all of them have finished the save, and the
    others wait for the one that has failed.
    """

    def __init__(self, commit: Any, handler: Handler) -> None:
        """Wrap an Orbax future."""
        self._commit, self._handler = commit, handler

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the part, as Orbax does, and record its failure."""
        try:
            return self._commit.result(timeout)
        except Exception as error:
            self._handler.failure = error
            raise


@ocp.args.register_with_handler(Handler, for_save=True, for_restore=True)  # Orbax ignores a handler without both
@dataclasses.dataclass
class Save(ocp.args.PyTreeSave):  # type: ignore[misc]  # Orbax is not typed
    """The tree to save, and the parts of its arrays that this process hashes, on the host."""

    parts: list[Part] = dataclasses.field(default_factory=list)


def open_manager(directory: str, read_only: bool = False, handler: Handler | None = None) -> ocp.CheckpointManager:
    """Return the manager of a directory, which keeps the two latest checkpoints and the best one.

    Args:
      directory: the directory. Unless `read_only`, it is made, and the remains of a killed save are deleted.
      read_only: change nothing.
      handler: the writer, which records failures; by default a new one.
    """
    best = policies.BestN(
        get_metric_fn=lambda metrics: -evaluation_error(metrics), n=1, keep_checkpoints_without_metrics=False
    )
    options = ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: -evaluation_error(metrics),  # else Orbax forgets the metrics when the run stops
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), best]),
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
    )
    return ocp.CheckpointManager(directory, item_handlers=handler or make_handler(), options=options)


def make_handler() -> Handler:
    """Return a writer of checkpoints."""
    # Compression takes more processor time than all other parts of a save, and shrinks it by a tenth only.
    return Handler(use_compression=False, type_handler_registry=_array_handlers())


def _array_handlers() -> Any:
    """Return Orbax's array handlers without their copy of arrays on the host, which are a `HostCopy` already.

    The handlers of some versions of Orbax do not have this option.
    """
    types = ocp.type_handlers
    has_option = "deepcopy_host_arrays" in inspect.signature(types.NumpyHandler).parameters
    on_host = types.NumpyHandler(deepcopy_host_arrays=False) if has_option else types.NumpyHandler()
    return types.create_type_handler_registry(
        (np.ndarray, on_host),
        (jax.Array, types.get_type_handler(jax.Array)),
    )
