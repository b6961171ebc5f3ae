"""A copy of the training state in host memory that does not fragment it."""

import mmap
from typing import Any

import jax
import numpy as np

LARGE = 2**20  # arrays from this number of bytes get memory pages of their own


class HostCopy:
    """A buffer in host memory for a tree of arrays, allocated once and overwritten by every copy.

    Checkpoints are written from the buffer in the background while training overwrites the arrays themselves. So a save
    never keeps an array of the training state alive, and saves cost one copy of the state, however many there are.
    Given the arrays themselves, Orbax keeps them alive: it reads `jax.Array.addressable_shards`, which JAX caches in
    the array, and each shard refers to its array. Such a cycle, and the donated buffers of the state with it, lives
    until Python's cyclic garbage collector runs.

    Large arrays get memory pages of their own. Allocated between XLA's temporary arrays, they would fragment the space
    that the next step needs in one piece.
    """

    def __init__(self) -> None:
        """Allocate nothing yet."""
        self._buffers: list[np.ndarray] = []

    def update(self, tree: Any) -> Any:
        """Return `tree` with its arrays copied to the host; this overwrites what the last call returned.

        Args:
          tree: arrays, each complete on the devices of this process.
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
