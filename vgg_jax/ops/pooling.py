"""The max pool of VGG, with a fast gradient, and PyTorch's adaptive pools."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from vgg_jax.ops.forms import by_platform
from vgg_jax.ops.sizes import surely


def max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h//2 w//2 c"]:
    """Return the 2x2 max pool of stride 2, which drops an odd last row or column.

    The gradient goes to the first maximum in reading order, as in PyTorch. The form depends on the platform: see
    `MAX_POOLS` and `ops.forms`.

    Args:
      x: feature maps (N, H, W, C).

    Returns:
      (N, H // 2, W // 2, C).
    """
    if not all(isinstance(side, int) for side in x.shape[1:3]):
        return _pool_by_slices(x)  # the other forms give other symbolic shapes
    y: jax.Array = by_platform("max_pool", MAX_POOLS, x)
    return y


def _first_maximum(parts: Sequence[jax.Array]) -> jax.Array:
    """Return the maximum of arrays; the derivative is that of the first maximum."""
    return functools.reduce(lambda a, b: jnp.where((b > a) | jnp.isnan(b), b, a), parts)


def _pool_by_slices(x: jax.Array) -> jax.Array:
    """Return the maximum of four strided slices.

    On a CPU `lax.reduce_window` has a slow gradient: the output and the gradient of 64x32x32x64 in float32 take 41
    instead of 1 ms (2 cores of a Xeon, JAX 0.10.1).
    """
    last_row, last_column = (length // 2 * 2 - 1 for length in x.shape[1:3])
    # The limits give all four slices the same symbolic shape.
    return _first_maximum([x[:, i : i + last_row : 2, j : j + last_column : 2] for i in (0, 1) for j in (0, 1)])


def _pool_by_window(x: jax.Array) -> jax.Array:
    """Return the maximum of windows, whose gradient XLA computes by select-and-scatter."""
    y: jax.Array = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return y


def _pool_by_reshape(x: jax.Array) -> jax.Array:
    """Return the maximum of four slices of the maps (N, H / 2, 2, W / 2, 2, C), which need no strides."""
    pairs = _pairs(x)
    return _first_maximum([pairs[:, :, i, :, j] for i in (0, 1) for j in (0, 1)])


@jax.custom_jvp
def _pool_by_index(x: jax.Array) -> jax.Array:
    """Return the maximum of four slices, as `_pool_by_reshape`, whose gradient needs the places of the maxima only.

    A GPU then reads one byte for each output in the backward pass, not the maps and three arrays of comparisons: 1.3
    instead of 3.4 ms for 256x224x224x64 in bfloat16 (H100). The gradient is one selection, which XLA fuses with that of
    the ReLU.
    """
    return _maximum_and_index(x)[0]


@_pool_by_index.defjvp
def _pool_by_index_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    y, index = _maximum_and_index(x)
    places = np.arange(4, dtype=np.int8).reshape(1, 1, 2, 1, 2, 1)
    chosen = index[:, :, None, :, None] == places
    return y, jnp.where(chosen, _pairs(tangent), 0).sum((2, 4)).astype(y.dtype)


def _pairs(x: jax.Array) -> jax.Array:
    """Return the maps (N, H, W, C) as (N, H // 2, 2, W // 2, 2, C)."""
    n, height, width, channels = x.shape
    return x[:, : height // 2 * 2, : width // 2 * 2].reshape(n, height // 2, 2, width // 2, 2, channels)


def _maximum_and_index(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the maximum of each window, and its place in reading order: 0 to 3, int8."""
    pairs = _pairs(x)
    y = pairs[:, :, 0, :, 0]
    index = jnp.zeros(y.shape, jnp.int8)
    for place, (row, column) in enumerate(((0, 1), (1, 0), (1, 1)), 1):
        other = pairs[:, :, row, :, column]
        larger = (other > y) | jnp.isnan(other)
        y, index = jnp.where(larger, other, y), jnp.where(larger, jnp.int8(place), index)
    return y, index


MAX_POOLS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "slices": _pool_by_slices,
    "window": _pool_by_window,
    "reshape": _pool_by_reshape,
    "index": _pool_by_index,
}


def plain_max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n rows columns c"]:  # H // 2; JAX has (H - 2) // 2 + 1
    """Return what `max_pool` returns, by Flax's operation, which compiles faster."""
    y: jax.Array = nn.max_pool(x, (2, 2), (2, 2))
    return y


def average_pool_2x2(x: Float[Array, "n h w c"]) -> Float[Array, "n rows columns c"]:
    """Return the 2x2 average pool of stride 2 of maps (N, H, W, C), which drops an odd last row or column."""
    y: jax.Array = nn.avg_pool(x, (2, 2), (2, 2))
    return y


def adaptive_pool(
    x: Float[Array, "n h w c"], height: int, width: int, reduce: Callable[..., Any] = jnp.mean
) -> Float[Array, "n {height} {width} c"]:
    """Return the pool to a fixed size, as `torch.nn.AdaptiveAvgPool2d`, or with `jnp.max` as `AdaptiveMaxPool2d`.

    Output i is of the rows from floor(i * H / height) to ceil((i + 1) * H / height), and the columns likewise. The
    windows may overlap, and they repeat rows if H < height.

    Args:
      x: feature maps (N, H, W, C).
      height: height of the output.
      width: width of the output.
      reduce: jnp.mean or jnp.max, applied to each window.

    Returns:
      (N, height, width, C).
    """
    return _pool(_pool(x, 1, height, reduce), 2, width, reduce)


def enlarge(x: Float[Array, "n h w c"], size: int) -> Float[Array, "n rows columns c"]:
    """Return the maps if they have at least `size` rows and columns, else the average pool to that size.

    Args:
      x: feature maps (N, H, W, C), whose H and W may be symbolic.
      size: the smallest height and width of the output.

    Returns:
      (N, max(H, size), max(W, size), C).
    """
    height, width = (jax.core.max_dim(side, size) for side in x.shape[1:3])  # symbolic sides are compared when known
    return _pool(_pool(x, 1, height, jnp.mean), 2, width, jnp.mean)


def square_windows(x: Float[Array, "n h w c"], size: int) -> Float[Array, "n h-{size}+1 w-{size}+1 {size}*{size}*c"]:
    """Return all square windows of maps, each flattened as (H, W, C): a dense layer of them is a convolution.

    Args:
      x: feature maps (N, H, W, C), with H and W of at least `size`.
      size: height and width of a window.

    Returns:
      (N, H - size + 1, W - size + 1, size * size * C).
    """
    rows, columns = x.shape[1] - size + 1, x.shape[2] - size + 1
    parts = [x[:, i : i + rows, j : j + columns] for i in range(size) for j in range(size)]
    return jnp.concatenate(parts, axis=-1)


def _pool(x: jax.Array, axis: int, size: Any, reduce: Callable[..., Any]) -> jax.Array:
    """Return the adaptive pool along one axis; its length and the size of the output may be symbolic."""
    length = x.shape[axis]
    if surely(lambda: length == size):
        return x
    if not (isinstance(length, int) and isinstance(size, int)):
        if reduce is not jnp.mean:
            raise ValueError("maxima over windows of a symbolic size are not supported; export a fixed size")
        return _pool_symbolic(x, axis, size)
    windows = [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
    return jnp.stack([reduce(lax.slice_in_dim(x, a, b, axis=axis), axis) for a, b in windows], axis)


def _pool_symbolic(x: jax.Array, axis: int, size: Any) -> jax.Array:
    """Return the average pool along an axis of symbolic length, by a product with weights of the pixels.

    The product has the highest precision, whatever that of the network: a pool of fixed size is a sum of float32.
    """
    length = jnp.asarray(x.shape[axis])
    first = jnp.arange(size)[:, None] * length // size
    after = -(-(jnp.arange(size)[:, None] + 1) * length // size)
    places = jnp.arange(x.shape[axis])
    weights = ((first <= places) & (places < after)) / (after - first)
    y = jnp.tensordot(weights.astype(x.dtype), x, (1, axis), precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(y, 0, axis)
