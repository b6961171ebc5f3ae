"""Checkpoints of a run: the latest and the best, by Orbax."""

import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from vgg_jax.training import TrainState


class Checkpoints:
    """The directory of a run's checkpoints; keeps the two latest and the one of the best accuracy.

    A checkpoint holds everything that changes in a run: step, parameters (with the frozen ones), running statistics,
    optimizer state, that of a plateau schedule, moving averages. The order of the data and every random number follow
    from the seed and the step. Saves happen in the background.
    """

    def __init__(self, directory: str) -> None:
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["accuracy"], n=1, keep_checkpoints_without_metrics=False
        )
        self._manager = ocp.CheckpointManager(
            os.path.abspath(directory),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), best]),
                cleanup_tmp_directories=True,
            ),
        )

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, metrics: dict[str, float] | None) -> None:
        """Starts to save `state`, with its evaluation if there was one, unless its step is saved already."""
        step = int(state.step)
        if step != self.latest_step:
            self._manager.save(step, args=ocp.args.StandardSave(_arrays(state)), metrics=metrics)

    def restore(self, state: TrainState) -> TrainState:
        """`state` with the newest checkpoint's arrays, laid over the devices as those of `state` are."""
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays(state))
        return state.replace(**self._manager.restore(self.latest_step, args=ocp.args.StandardRestore(target)))

    def close(self) -> None:
        """Waits until every save is complete."""
        self._manager.close()


def read_latest(directory: str) -> dict[str, Any]:
    """The newest checkpoint's arrays on the host, whatever devices they were saved from."""
    handler = ocp.StandardCheckpointHandler()  # else there are no metadata to be had
    with ocp.CheckpointManager(os.path.abspath(directory), item_handlers=handler) as manager:
        step = manager.latest_step()
        saved = manager.item_metadata(step)
        target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved)
        return jax.tree.map(np.asarray, manager.restore(step, args=ocp.args.StandardRestore(target)))


def holds_checkpoint(directory: str) -> bool:
    """Whether there is a checkpoint in the directory, which may be missing."""
    return os.path.isdir(directory) and any(name.isdigit() for name in os.listdir(directory))


def _arrays(state: TrainState) -> dict[str, Any]:
    names = ["step", "params", "batch_stats", "opt_state"]
    names += [name for name in ("frozen_params", "plateau", "ema") if getattr(state, name)]
    return {name: getattr(state, name) for name in names}
