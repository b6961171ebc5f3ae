"""SHA-256 checksums in Orbax's metadata, which detect damaged checkpoints.

Orbax commits a checkpoint atomically, but restores a damaged one silently. So the SHA-256 of each array and of the
metadata is saved beside the arrays, and compared on reading.
"""

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

METADATA = "_CHECKPOINT_METADATA"  # a file of Orbax; our metadata are under `custom_metadata`
OWN_CHECKSUM = "sha256_of_metadata"


def describe(arrays: Mapping[str, np.ndarray], metrics: Any, progress: Any) -> dict[str, Any]:
    """Return the metadata of a checkpoint: shapes and checksums of the arrays, evaluation, progress, own checksum."""
    shapes = {name: list(array.shape) for name, array in arrays.items()}
    progress = copy.deepcopy(progress)  # Orbax writes the metadata later
    metadata = {"shapes": shapes, "sha256": checksums(arrays), "metrics": metrics, "progress": progress}
    return {**metadata, OWN_CHECKSUM: _digest(metadata)}


def read_metadata(path: str) -> dict[str, Any]:
    """Return the metadata that `describe` made for the checkpoint at `path`.

    Raises:
      ValueError: if they are damaged.
    """
    with open(os.path.join(path, METADATA)) as file:
        metadata = dict(json.load(file)["custom_metadata"])
    expected = metadata.pop(OWN_CHECKSUM)
    if _digest(metadata) != expected:
        raise ValueError("failed the checksum")
    return metadata


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by path, such as params/conv1_1/kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def named_arrays(tree: Any) -> dict[str, np.ndarray]:
    """Return the arrays of a tree by path, each complete and on the host."""

    def on_host(array: Any) -> np.ndarray:
        if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
            array = multihost_utils.process_allgather(array, tiled=True)
        return np.asarray(array)

    return {name: on_host(leaf) for name, leaf in named_leaves(tree).items()}


def checksums(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return the SHA-256 of each array together with its dtype and shape."""

    def checksum(array: np.ndarray) -> str:
        digest = hashlib.sha256(f"{array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
        return digest.hexdigest()

    with ThreadPoolExecutor() as threads:  # hashlib releases the GIL
        return dict(zip(arrays, threads.map(checksum, arrays.values()), strict=True))


def difference(saved: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str | None:
    """Return a description of the arrays that differ from the saved checksums; None if all agree."""
    found = checksums(arrays)
    wrong = [name for name in sorted(saved.keys() | found.keys()) if saved.get(name) != found.get(name)]
    return f"{', '.join(wrong[:3])} failed the checksum" if wrong else None


def _digest(metadata: Any) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
