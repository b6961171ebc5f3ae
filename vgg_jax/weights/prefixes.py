"""The names of a state dict without what wrappers of modules put into them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from vgg_jax.errors import UserError

Leaf = TypeVar("Leaf")

# DataParallel and DistributedDataParallel add `module`, torch.compile adds `_orig_mod`, anywhere in a name.
TRANSPARENT = ("module", "_orig_mod")


def strip_prefixes(arrays: Mapping[str, Leaf]) -> tuple[dict[str, Leaf], tuple[str, ...]]:
    """Return arrays under names without wrappers and without the prefix of the convolutional part.

    Args:
      arrays: from names such as `module.backbone.features.module.0.weight` to arrays.

    Returns:
      From names such as `features.0.weight` to arrays, and the prefixes that were removed, such as `module.`. Names
      without these prefixes stay as they are.

    Raises:
      UserError: if there are two networks under different prefixes.
    """
    renamed: dict[str, Leaf] = {}
    removed: dict[str, None] = {}
    for name, array in arrays.items():
        *path, leaf = name.split(".")
        removed |= {f"{part}.": None for part in path if part in TRANSPARENT}
        short = ".".join([*(part for part in path if part not in TRANSPARENT), leaf])
        if short in renamed:
            raise _two_networks([name, short])
        renamed[short] = array
    matches = [re.fullmatch(r"((?:.+\.)?)features\.0\.weight", name) for name in renamed]
    prefixes = [match.group(1) for match in matches if match]
    if len(prefixes) > 1:
        raise _two_networks([f"{prefix}features" for prefix in prefixes])
    if not prefixes or not prefixes[0]:
        return renamed, tuple(removed)
    stripped: dict[str, Leaf] = {}
    for name, array in renamed.items():
        short = name.removeprefix(prefixes[0])
        if short in stripped:
            raise _two_networks([name, short])
        stripped[short] = array
    return stripped, (*removed, prefixes[0])


def _two_networks(names: Iterable[str]) -> UserError:
    return UserError(f"{TWO}: {', '.join(names)}; {ONE}")


TWO = "holds several networks"
ONE = "expected one: in PyTorch, save only the state dict of the one to load"


def natural_key(name: str) -> list[Any]:
    """Return a key for `sorted` that orders numbers in names by value: conv2 before conv10."""
    parts = re.split(r"(\d{1,9})", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def listed(names: Iterable[str]) -> str:
    """Return at most five names for a message, and the number of the others."""
    names = [name[:80] for name in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
