"""What keeps a damaged checkpoint from being taken for a whole one: SHA-256 sums in Orbax's metadata.

Orbax commits a checkpoint whole or not at all, but restores a damaged one without a word. So the SHA-256 of each array
is saved beside it, and that of the metadata with them, and compared when it is read.
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

METADATA = "_CHECKPOINT_METADATA"  # Orbax's file of a checkpoint, with ours under `custom_metadata`
OWN_CHECKSUM = "sha256_of_metadata"


def describe(arrays: Mapping[str, np.ndarray], metrics: Any, progress: Any) -> dict[str, Any]:
    """What is saved with the arrays: shapes and checksums, the evaluation, the progress; and the checksum of this."""
    shapes = {name: list(array.shape) for name, array in arrays.items()}
    progress = copy.deepcopy(progress)  # Orbax writes it later
    metadata = {"shapes": shapes, "sha256": checksums(arrays), "metrics": metrics, "progress": progress}
    return {**metadata, OWN_CHECKSUM: _digest(metadata)}


def read_metadata(path: str) -> dict[str, Any]:
    """What `describe` gave, of the checkpoint at `path`.

    Raises:
      ValueError: where that is damaged.
    """
    with open(os.path.join(path, METADATA)) as file:
        metadata = dict(json.load(file)["custom_metadata"])
    expected = metadata.pop(OWN_CHECKSUM)
    if _digest(metadata) != expected:
        raise ValueError("it failed the checksum")
    return metadata


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path: params/conv1_1/kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def named_arrays(tree: Any) -> dict[str, np.ndarray]:
    """The same, whole and on the host."""

    def on_host(array: Any) -> np.ndarray:
        if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
            array = multihost_utils.process_allgather(array, tiled=True)
        return np.asarray(array)

    return {name: on_host(leaf) for name, leaf in named_leaves(tree).items()}


def checksums(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The SHA-256 of each array, its dtype and its shape."""

    def checksum(array: np.ndarray) -> str:
        digest = hashlib.sha256(f"{array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
        return digest.hexdigest()

    with ThreadPoolExecutor() as threads:  # hashlib lets the others run
        return dict(zip(arrays, threads.map(checksum, arrays.values()), strict=True))


def difference(saved: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str | None:
    """Which of the arrays are not those of the saved checksums; None where all are."""
    found = checksums(arrays)
    wrong = [name for name in sorted(saved.keys() | found.keys()) if saved.get(name) != found.get(name)]
    return f"{', '.join(wrong[:3])} failed the checksum" if wrong else None


def _digest(metadata: Any) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
