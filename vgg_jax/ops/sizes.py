"""Comparisons of sizes that may be symbolic dimensions of `jax.export`."""

from collections.abc import Callable

from jax.extend.core import InconclusiveDimensionOperation


def surely(holds: Callable[[], bool]) -> bool:
    """Return whether a comparison of sizes holds, for symbolic dimensions at all of their sizes.

    Args:
      holds: a function without arguments that compares, such as `lambda: height <= 2`.
    """
    try:
        return bool(holds())
    except InconclusiveDimensionOperation:
        return False
