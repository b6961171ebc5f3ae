"""The memory of a run: what its process holds and will hold, and a copy of the state that does not fragment it."""

import mmap
import os
from typing import Any

import jax
import numpy as np

LARGE = 2**20  # bytes of an array from which it gets pages of its own


class HostCopy:
    """A copy of a tree of arrays in host memory that is allocated once and overwritten by every later copy.

    A checkpoint is written from it in the background while training overwrites the arrays themselves. So a save never
    keeps an array of the training state alive, and a run with saves holds one copy of the state more than one without,
    however many saves there are. Orbax given the arrays themselves keeps them: it reads `jax.Array.addressable_shards`,
    which JAX caches in the array, and whose shard refers to the array again. Such a cycle lives until Python's cyclic
    garbage collector happens to run, and the donated buffers of the state with it.

    Large arrays get pages of their own. Allocated between XLA's temporary arrays, they would divide the space that the
    next step needs in one piece.
    """

    def __init__(self) -> None:
        """Allocate nothing yet."""
        self._buffers: list[np.ndarray] = []

    def update(self, tree: Any) -> Any:
        """Return `tree` with its arrays copied to the host; this overwrites what the last call returned.

        Args:
          tree: arrays, each whole on the devices of this process.
        """
        leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, tree))
        layout = [(leaf.shape, leaf.dtype) for leaf in leaves]
        if layout != [(buffer.shape, buffer.dtype) for buffer in self._buffers]:
            self._buffers = [_allocate(shape, dtype) for shape, dtype in layout]
        for buffer, leaf in zip(self._buffers, leaves, strict=True):
            np.copyto(buffer, leaf)
        return jax.tree.unflatten(structure, self._buffers)


def _allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    if size < LARGE:
        return np.empty(shape, dtype)
    return np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)


def resident_bytes() -> int | None:
    """Return the bytes of physical memory that this process holds; None if the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def run_memory(step: jax.stages.Compiled, evaluation: jax.stages.Compiled, state: Any) -> dict[str, int]:
    """Return the memory that a run needs, in bytes; empty if the compiler does not tell.

    Call it when the state and the data are in place, after `return_freed_memory`.

    Args:
      step: the compiled training step, which donates the state.
      evaluation: the compiled evaluation step.
      state: the training state.

    Returns:
      `peak`: the bytes of each device during a step, with state and batch. `temporary`: the part of them that is free
      between steps. `evaluation`: the bytes that evaluation takes instead of that part. On a CPU under Linux, also
      `resident`: the bytes that this process will hold. They are those that it holds now, the larger of `temporary` and
      `evaluation`, and the copy of the state that checkpoints are saved from.
    """
    of_step, of_evaluation = step.memory_analysis(), evaluation.memory_analysis()
    if of_step is None or of_evaluation is None:
        return {}
    lasting = of_step.argument_size_in_bytes + of_step.output_size_in_bytes - of_step.alias_size_in_bytes
    temporary = of_step.temp_size_in_bytes
    memory = {"peak": lasting + temporary, "temporary": temporary, "evaluation": of_evaluation.temp_size_in_bytes}
    held = resident_bytes()
    if jax.default_backend() == "cpu" and held is not None:
        leaves = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
        copy = sum(leaf.nbytes for leaf in leaves) if jax.process_count() == 1 else 0
        memory["resident"] = held + jax.local_device_count() * max(temporary, memory["evaluation"]) + copy
    return memory
