"""The SHA-256 of a network's weights, under which computed features are kept."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vgg_jax.model import VGG


def weights_hash(model: VGG, variables: Mapping[str, Any], layers: Sequence[str]) -> str:
    """Return the SHA-256 of all variables that named activations depend on, as hexadecimal digits.

    Equal variables have equal hashes, whatever file they come from, and whether or not deeper layers were loaded.

    Args:
      model: the network.
      variables: its variables.
      layers: names from `model.layer_names`.
    """
    names = model.layer_names
    used = set(names[: max(map(names.index, layers)) + 1])
    total = hashlib.sha256()
    for path, array in sorted(_leaves(variables, ())):
        if path[1] in used:
            values = np.ascontiguousarray(array)
            total.update(f"{'/'.join(path)} {values.dtype} {values.shape}\n".encode())
            total.update(values.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and the array of each leaf; the second name of a path is that of the layer."""
    for name, branch in tree.items():
        if isinstance(branch, Mapping):
            yield from _leaves(branch, (*path, name))
        else:
            yield (*path, name), branch
