"""A copy of the training state in host memory that does not fragment it, and without gathering sharded arrays."""

import dataclasses
import math
import mmap
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

LARGE = 2**20  # arrays from this number of bytes get memory pages of their own


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of a named array that one device holds: the whole array, or some rows of its second last axis."""

    name: str
    shape: tuple[int, ...]  # of the whole array
    rows: slice  # of the second last axis; slice(None) for an array that is not sharded
    array: Any  # on the host, or on its device

    @property
    def is_whole(self) -> bool:
        """Return whether the part is the whole array."""
        return self.rows == slice(None)


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
          tree: arrays, each complete on the devices of this process. A sharded array is copied shard by shard.
        """
        leaves, structure = jax.tree.flatten(tree)
        start_copies(leaves)
        self._allocate([(leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves])
        for buffer, leaf in zip(self._buffers, leaves, strict=True):
            for part in local_parts("", leaf):
                target = buffer if part.is_whole else buffer[..., part.rows, :]
                np.copyto(target, np.asarray(part.array))
        return jax.tree.unflatten(structure, self._buffers)

    def update_parts(self, arrays: Mapping[str, Any]) -> list[Part]:
        """Return the parts that this process is responsible for, copied likewise.

        Args:
          arrays: arrays by name, which may lie on the devices of several processes.
        """
        parts = owned_parts(arrays)
        start_copies([part.array for part in parts])
        self._allocate([(part.array.shape, np.dtype(part.array.dtype)) for part in parts])
        for buffer, part in zip(self._buffers, parts, strict=True):
            np.copyto(buffer, np.asarray(part.array))
        return [dataclasses.replace(part, array=buffer) for buffer, part in zip(self._buffers, parts, strict=True)]

    def _allocate(self, layout: list[tuple[tuple[int, ...], np.dtype]]) -> None:
        if layout != [(buffer.shape, buffer.dtype) for buffer in self._buffers]:
            self._buffers = [_allocate(shape, dtype) for shape, dtype in layout]


def start_copies(arrays: list[Any]) -> None:
    """Start to copy all arrays from their devices, so that the copies overlap."""
    for array in arrays:
        if isinstance(array, jax.Array):
            array.copy_to_host_async()


def local_parts(name: str, array: Any) -> list[Part]:
    """Return the distinct parts of an array on the devices of this process, without a copy.

    Args:
      name: the name of the array.
      array: an array of NumPy, or of JAX, replicated or sharded along its second last axis.
    """
    shape = tuple(array.shape)
    if not isinstance(array, jax.Array) or array.is_fully_replicated:
        return [Part(name, shape, slice(None), array)]
    # Not `addressable_shards`: JAX caches them in the array, which they refer to.
    local = [array.addressable_data(i) for i in range(len(array.sharding.addressable_devices))]
    indices = array.sharding.addressable_devices_indices_map(shape)
    parts = {}
    for piece in local:
        (device,) = piece.devices()
        rows = _rows(indices[device], shape)
        parts[rows.start, rows.stop] = Part(name, shape, rows, piece)
    return list(parts.values())


def owned_parts(arrays: Mapping[str, Any], process: int | None = None, per_process: int | None = None) -> list[Part]:
    """Return the parts of arrays that a process saves checksums of; each part belongs to one process.

    Args:
      arrays: arrays by name.
      process: the process; by default this one.
      per_process: devices that count as one process, for tests; by default the processes are the real ones.
    """
    process = jax.process_index() if process is None else process

    def process_of(device: jax.Device) -> int:
        return int(device.process_index if per_process is None else device.id // per_process)

    parts = []
    for number, (name, array) in enumerate(arrays.items()):
        if not isinstance(array, jax.Array):
            parts += [Part(name, tuple(array.shape), slice(None), array)] if process == 0 else []
            continue
        holders: dict[tuple[Any, Any], set[int]] = {}
        for device, index in array.sharding.devices_indices_map(array.shape).items():
            rows = _rows(index, array.shape)
            holders.setdefault((rows.start, rows.stop), set()).add(process_of(device))
        for part in local_parts(name, array):
            # Replicated arrays take turns, so that the processes share the work.
            candidates = sorted(holders[part.rows.start, part.rows.stop])
            if candidates[number % len(candidates)] == process:
                parts.append(part)
    return parts


def _rows(index: Any, shape: tuple[int, ...]) -> slice:
    """Return the rows of the second last axis that an index selects; raise ValueError if it selects by another axis."""
    selected = [
        slice(None) if part.indices(size) == (0, size, 1) else part for part, size in zip(index, shape, strict=True)
    ]
    others = [part for axis, part in enumerate(selected) if axis != len(shape) - 2]
    if any(part != slice(None) for part in others):
        raise ValueError(f"an array of shape {shape} is sharded as {index}; expected shards of its second last axis")
    return selected[-2] if len(selected) > 1 else slice(None)


def _allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE:
        return np.empty(shape, dtype)
    return np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)
