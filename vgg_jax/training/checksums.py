"""SHA-256 checksums beside Orbax's arrays, which detect damaged checkpoints.

Orbax commits a checkpoint atomically, but restores a damaged one silently. So checksums are saved beside the arrays,
and compared on reading. The checksum of an array is the sum of the SHA-256 of its rows, modulo 2**256. Each row is
hashed with its place, the dtype and the shape. So processes hash the rows that they hold, in any order and on any
number of devices, and nothing is gathered. A row is what one index of the second last axis selects, because sharded
arrays are sharded along this axis; an array with fewer axes is one row.

Older checkpoints have the SHA-256 of each whole array in their metadata, as `sha256`.
"""

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vgg_jax.training.agreement import exchange, process_index, process_total
from vgg_jax.training.host_copy import Part, local_parts, owned_parts, start_copies

METADATA = "_CHECKPOINT_METADATA"  # a file of Orbax; our metadata are under `custom_metadata`
OWN_CHECKSUM = "sha256_of_metadata"
SUMS = "checksums-{}.json"  # one file of each process that saves
MODULUS = 2**256
CHUNK = 2**23  # bytes that one thread hashes at a time
THREADS = 4  # these leave the other cores to training


def describe(shapes: Mapping[str, list[int]], metrics: Any, progress: Any) -> dict[str, Any]:
    """Return the metadata of a checkpoint: shapes of the arrays, processes, evaluation, progress, own checksum."""
    progress = copy.deepcopy(progress)  # Orbax writes the metadata later
    metadata = {"shapes": dict(shapes), "processes": process_total(), "metrics": metrics, "progress": progress}
    return {**metadata, OWN_CHECKSUM: _digest(metadata)}


def read_metadata(path: str) -> dict[str, Any]:
    """Return the metadata that `describe` made for the checkpoint at `path`.

    Raises:
      ValueError: if they are damaged.
    """
    with open(os.path.join(path, METADATA)) as file:
        metadata = dict(json.load(file)["custom_metadata"])
    return _checked(metadata)


def write_sums(folder: str | os.PathLike[str], parts: Iterable[Part]) -> None:
    """Write the checksums of the parts of arrays that this process is responsible for."""
    sums = {name: f"{number:x}" for name, number in row_sums(parts).items()}
    with open(os.path.join(folder, SUMS.format(process_index())), "w") as file:
        json.dump({"sums": sums, OWN_CHECKSUM: _digest({"sums": sums})}, file)


def read_sums(path: str) -> dict[str, int] | None:
    """Return the checksum of each array of the checkpoint at `path`; None if it has those of older versions.

    Raises:
      ValueError, OSError: if a file is damaged or missing.
    """
    metadata = read_metadata(path)
    if "sha256" in metadata:
        return None
    total = dict.fromkeys(metadata["shapes"], 0)
    for process in range(metadata["processes"]):
        with open(os.path.join(path, SUMS.format(process))) as file:
            for name, number in _checked(json.load(file))["sums"].items():
                total[name] = (total[name] + int(number, 16)) % MODULUS
    return total


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by path, such as params/conv1_1/kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def row_sums(parts: Iterable[Part]) -> dict[str, int]:
    """Return, for each name, the sum of the SHA-256 of the rows in its parts."""
    sums: dict[str, int] = {}
    with ThreadPoolExecutor(THREADS) as threads:  # hashlib releases the GIL
        tasks = [(part.name, threads.submit(_sum_of_rows, part, rows)) for part in parts for rows in _chunks(part)]
        for name, task in tasks:
            sums[name] = (sums.get(name, 0) + task.result()) % MODULUS
    return sums


def not_finite(parts: Iterable[Part]) -> list[str]:
    """Return the names of the parts that contain NaN or infinite values."""

    def is_finite(array: np.ndarray) -> bool:
        with np.errstate(all="ignore"):
            # A sum takes a third of the time of np.isfinite. It may overflow, so only a finite sum decides.
            return bool(np.isfinite(array.sum()) or np.isfinite(array).all())

    parts = list(parts)
    with ThreadPoolExecutor(THREADS) as threads:
        finite = threads.map(is_finite, [part.array for part in parts])
        return [part.name for part, is_good in zip(parts, finite, strict=True) if not is_good]


def problem_of(path: str, tree: Any) -> str | None:
    """Return which arrays differ from the checksums of the checkpoint at `path`; None if all agree.

    Args:
      path: the directory of the checkpoint.
      tree: its arrays, on the host or on the devices of all processes. All processes call this.
    """
    saved = read_sums(path)
    if saved is None:
        return _difference(read_metadata(path)["sha256"], _whole_arrays(tree))
    arrays = named_leaves(tree)
    start_copies(list(arrays.values()))
    local = {name: local_parts(name, array) for name, array in arrays.items()}
    whole = [part for parts in local.values() for part in parts if part.is_whole]
    split = {name: arrays[name] for name, parts in local.items() if not parts[0].is_whole}
    found = row_sums(_on_host(whole))
    reports = exchange({"whole": _wrong(saved, found), "split": row_sums(_on_host(owned_parts(split)))})
    total = {name: sum(report["split"].get(name, 0) for report in reports) % MODULUS for name in split}
    missing = saved.keys() ^ arrays.keys()
    wrong = sorted({name for report in reports for name in report["whole"]} | set(_wrong(saved, total)) | missing)
    return _failed(wrong)


def _wrong(saved: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    return [name for name in found if saved.get(name) != found[name]]


def _failed(wrong: list[str]) -> str | None:
    return f"{', '.join(wrong[:3])} failed the checksum" if wrong else None


def _on_host(parts: Iterable[Part]) -> list[Part]:
    return [Part(part.name, part.shape, part.rows, np.asarray(part.array)) for part in parts]


def _chunks(part: Part) -> list[slice]:
    """Return the rows of a part in slices of about CHUNK bytes."""
    count = part.array.shape[-2] if part.array.ndim > 1 else 1
    step = max(1, CHUNK * count // max(1, part.array.nbytes))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _sum_of_rows(part: Part, rows: slice) -> int:
    """Return the sum of the SHA-256 of some rows of a part."""
    array = part.array if part.array.ndim > 1 else part.array.reshape(1, -1)
    count, first = rows.stop - rows.start, (part.rows.start or 0) + rows.start
    contiguous = np.ascontiguousarray(np.moveaxis(array[..., rows, :], -2, 0))
    content = contiguous.reshape(-1).view(np.uint8).data if contiguous.size else memoryview(b"")
    start, size, total = hashlib.sha256(f"{array.dtype} {part.shape} ".encode()), len(content) // count, 0
    for row in range(count):
        digest = start.copy()
        digest.update((first + row).to_bytes(8, "little"))
        digest.update(content[row * size : (row + 1) * size])
        total += int.from_bytes(digest.digest(), "little")
    return total


def _difference(saved: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str | None:
    """Return a description of the arrays that differ from the checksums of an older version; None if all agree."""

    def checksum(array: np.ndarray) -> str:
        digest = hashlib.sha256(f"{array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
        return digest.hexdigest()

    with ThreadPoolExecutor() as threads:
        found = dict(zip(arrays, threads.map(checksum, arrays.values()), strict=True))
    return _failed([name for name in sorted(saved.keys() | found.keys()) if saved.get(name) != found.get(name)])


def _whole_arrays(tree: Any) -> dict[str, np.ndarray]:
    """Return the arrays of a tree by path, each complete and on the host."""

    def on_host(array: Any) -> np.ndarray:
        if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
            array = multihost_utils.process_allgather(array, tiled=True)
        return np.asarray(array)

    return {name: on_host(leaf) for name, leaf in named_leaves(tree).items()}


def _checked(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return metadata without their own checksum; raise ValueError if it differs."""
    expected = metadata.pop(OWN_CHECKSUM)
    if _digest(metadata) != expected:
        raise ValueError("failed the checksum")
    return metadata


def _digest(metadata: Any) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
