"""The methods of the 3x3 convolution on a CPU, and of its gradients.

Comments give speeds in GFLOP/s of float32, counting the work of the direct convolution, on 2 cores of an EPYC (Zen 4,
JAX 0.10.1). A matrix product reaches about 200 there.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from vgg_jax.ops import winograd
from vgg_jax.ops.sizes import surely

BAND = winograd.ROWS  # rows of a band, the part of a feature map that is computed at once
SMALLEST_BAND = 384  # A map is computed in bands if one row of the whole batch has at least this many pixels.


class Method(NamedTuple):
    """A method of convolution, for maps with a border of zeros, one pixel wide.

    Without the border, height and width are multiples of 4.
    """

    transform: Callable[[jax.Array], jax.Array]  # kernel -> transformed kernel
    convolution: Callable[[jax.Array, jax.Array], jax.Array]  # map, transformed kernel -> output
    gradient: Callable[[jax.Array, jax.Array], jax.Array]  # map, gradient of output -> gradient of transformed kernel
    kernel_gradient: Callable[[jax.Array], jax.Array]  # gradient of transformed kernel -> gradient of kernel


def _columns(x: jax.Array) -> jax.Array:
    """Return nine shifted copies, concatenated along the channels: (N, H + 2, W + 2, C) to (N, H, W, 9 C)."""
    height, width = x.shape[1] - 2, x.shape[2] - 2
    return jnp.concatenate([x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=-1)


# XLA's convolution is slow if the input has few channels, as in the first layer. The output and the gradient of the
# kernel, batch 64, 32x32, on a Xeon: 3 channels 24 -> 117, 1 channel 13 -> 64.
_IM2COL = Method(
    lambda kernel: kernel.reshape(-1, kernel.shape[-1]),
    lambda x, kernel: _columns(x) @ kernel,
    lambda x, dy: jnp.einsum("nhwc,nhwd->cd", _columns(x), dy),
    lambda gradient: gradient.reshape(3, 3, -1, gradient.shape[-1]),
)
_WINOGRAD = Method(winograd.transform, winograd.convolution, winograd.gradient, winograd.kernel_gradient)
METHODS = {"im2col": _IM2COL, "winograd": _WINOGRAD}


def convolution(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, *, method: str) -> jax.Array:
    """Return the convolution of maps (N, H, W, C) by a kernel (3, 3, C, D), plus the bias (D,): (N, H, W, D)."""
    height, width = x.shape[1:3]
    by = METHODS[method]
    x, kernels = whole_tiles(x), by.transform(kernel)

    def product(x: jax.Array) -> jax.Array:
        y = by.convolution(x, kernels)
        return y if bias is None else y + bias

    if _in_bands(x):
        value = kernel[0, 0, 0, 0] if bias is None else bias[0]
        y = in_bands(product, x, BAND, _map_of(value, x.shape, kernel.shape[-1]))
    else:
        y = product(with_border(x))
    return y[:, :height, :width]


def in_bands(product: Callable[[jax.Array], jax.Array], x: jax.Array, rows: int, y: jax.Array) -> jax.Array:
    """Return the output (N, H, W, D) of a convolution that is computed in bands.

    Args:
      product: the convolution of maps with a border.
      x: feature maps (N, H, W, C) without a border.
      rows: the rows of a band, which divide H.
      y: an array of any values in the shape of the output.
    """

    def put_band(i: jax.Array, y: jax.Array) -> jax.Array:
        return _with_band(y, i, product(_band_with_border(x, i, rows)), rows)

    output: jax.Array = lax.fori_loop(0, x.shape[1] // rows, put_band, y)
    return output


def gradients(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, *, method: str, wanted: tuple[bool, bool, bool]
) -> list[jax.Array]:
    """Return those gradients of x, kernel and bias that are wanted, given the gradient `dy` of the output.

    One loop computes all three, so that the memory of `dy`, a whole map, is free after it.
    """
    _, height, width, channels = x.shape
    by = METHODS[method]
    x, dy = whole_tiles(x), whole_tiles(dy)
    # This layout forces XLA to transpose the kernel by a copy. Otherwise the sums of the transform transpose while they
    # read: 22 instead of 2 ms for 512 to 512 channels.
    rows_first = Layout(major_to_minor=(0, 1, 2, 3))
    kernels = by.transform(with_layout_constraint(kernel.swapaxes(2, 3), rows_first)[::-1, ::-1])

    def add_band(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dx, dkernels, dbias = sums
        band = _band(dy, i)
        dx = _with_band(dx, i, by.convolution(_band_with_border(dy, i), kernels))
        return dx, dkernels + by.gradient(_band_with_border(x, i), band), dbias + bias_gradient(band)

    # With several devices that share a batch, the loop would sum over the devices in each band.
    if _in_bands(x) and jax.device_count() == 1:
        zeros = jnp.zeros(jax.eval_shape(by.transform, kernel).shape, x.dtype), jnp.zeros(kernel.shape[-1], x.dtype)
        sums = (_map_of(kernel[0, 0, 0, 0], x.shape, channels), *zeros)
        dx, dkernels, dbias = lax.fori_loop(0, x.shape[1] // BAND, add_band, sums)
    else:
        dx = by.convolution(with_border(dy), kernels)
        dkernels, dbias = by.gradient(with_border(x), dy), bias_gradient(dy)
    all_three = (dx[:, :height, :width], by.kernel_gradient(dkernels), dbias)
    # XLA removes what only the others need, in the loop too.
    return [gradient for gradient, is_wanted in zip(all_three, wanted, strict=True) if is_wanted]


def bias_gradient(dy: jax.Array) -> jax.Array:
    """Return the sum of maps (..., H, W, D) over all axes but the last, summed in at least float32.

    The sum first runs over whole image rows, because XLA:CPU does not vectorize a sum over all axes but the last.
    """
    rows = dy.reshape(-1, dy.shape[-2] * dy.shape[-1]).astype(jnp.promote_types(dy.dtype, jnp.float32))
    return rows.sum(0).reshape(dy.shape[-2:]).sum(0).astype(dy.dtype)


def _in_bands(x: jax.Array) -> bool:
    """Return whether the map is computed 4 rows at a time.

    A band stays in the cache, but each band reads the kernels again. Forward by Winograd's algorithm, all at once -> in
    bands: 224x224x64 batch 8 213 -> 326, 56x56x256 453 -> 561, 32x32x64 batch 64 228 -> 347, 28x28x512 batch 8
    543 -> 458.
    """
    return surely(lambda: x.shape[0] * x.shape[2] >= SMALLEST_BAND)


def whole_tiles(x: jax.Array, rows: int = BAND) -> jax.Array:
    """Return the map, padded with zeros to a multiple of 4 rows and columns, or of `rows`."""
    after = [-length % rows for length in x.shape[1:3]]
    return jnp.pad(x, ((0, 0), *((0, length) for length in after), (0, 0))) if any(after) else x


def with_border(x: jax.Array) -> jax.Array:
    """Return the map with a border of zeros, one pixel wide."""
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _band(x: jax.Array, i: jax.Array, rows: int = BAND) -> jax.Array:
    """Return band `i` of the map: (N, rows, W, C)."""
    return lax.dynamic_slice_in_dim(x, i * rows, rows, 1)


def _band_with_border(x: jax.Array, i: jax.Array, rows: int = BAND) -> jax.Array:
    """Return band `i` with the pixels around it, which are zeros outside the map: (N, rows + 2, W + 2, C).

    This copy stays in the cache. A copy of the whole map with its border would take as long and need as much memory as
    the map.
    """
    n, height, width, channels = x.shape

    def row(y: jax.Array) -> jax.Array:
        return jnp.where((y >= 0) & (y < height), lax.dynamic_slice_in_dim(x, jnp.clip(y, 0, height - 1), 1, 1), 0)

    band: jax.Array = jnp.zeros((n, rows + 2, width + 2, channels), x.dtype)
    for first, part in ((0, row(i * rows - 1)), (1, _band(x, i, rows)), (rows + 1, row((i + 1) * rows))):
        band = lax.dynamic_update_slice(band, part, (0, first, 1, 0))
    band = lax.optimization_barrier(band)
    return band


def _map_of(value: jax.Array, shape: tuple[int, ...], channels: int) -> jax.Array:
    """Return a map of any value to write bands into.

    Not jnp.zeros: XLA would share one buffer of zeros between all maps and copy it.
    """
    return jnp.broadcast_to(value, (*shape[:3], channels))


def _with_band(y: jax.Array, i: jax.Array, band: jax.Array, rows: int = BAND) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(y, band, i * rows, 1)
