"""The copy of a transposed array, in blocks that fit the cache."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

ALIGNMENT = 64  # bytes, of arrays that JAX on a CPU uses without a copy
FORGET_AFTER = 8 * 2**20  # bytes


def copy_blocks(
    view: np.ndarray, dtype: Any, axis: int, check_finite: bool = False, forget: Callable[[], None] = lambda: None
) -> tuple[np.ndarray, bool]:
    """Return a C-ordered copy, made in blocks of 16 along the axis of the output features, and if it is finite.

    Copying the transposed fc6 in one pass misses the cache at every element: blocks take 0.6 s instead of 3.2 s.
    """
    copy = _aligned(view.shape, dtype)
    source, target = np.moveaxis(view, axis, 0), np.moveaxis(copy, axis, 0)
    is_finite, since = True, 0
    for i in range(0, len(source), 16):
        block = target[i : i + 16]
        block[...] = source[i : i + 16]
        is_finite = is_finite and not (check_finite and not np.isfinite(block).all())
        since += block.nbytes
        if since > FORGET_AFTER:
            forget()
            since = 0
    if view.ndim > 1:
        forget()
    return copy, is_finite


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array of any values at an address that JAX on a CPU can use without a copy."""
    count = math.prod(shape) * jnp.dtype(dtype).itemsize
    memory = np.empty(count + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    aligned: np.ndarray = memory[start : start + count].view(dtype).reshape(shape)
    return aligned
