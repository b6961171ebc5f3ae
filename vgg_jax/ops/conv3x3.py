"""The 3x3 convolution of stride 1, on a CPU by the fastest method known for its shape.

Comments give speeds in GFLOP/s of float32, counting the work of the direct convolution, on 2 cores of an EPYC (Zen 4,
JAX 0.10.1). A matrix product reaches about 200 there.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from vgg_jax.ops import winograd

BAND = winograd.ROWS  # rows of a band, the part of a feature map that is computed at once
# Winograd's algorithm repays its compile time only from this many multiply-adds per layer. VGG-16, one image of
# 224x224: inference 186 -> 103 ms, compilation 0.7 -> 1.8 s. VGG-16-BN, 16 images of 32x32: inference 55 -> 40 ms,
# compilation 1.2 -> 2.6 s; a training step 242 -> 178 ms, compilation 12.4 -> 15.5 s.
SMALLEST_WORK = 2**29
SMALLEST_BAND = 384  # A map is computed in bands if one row of the whole batch has at least this many pixels.


class Conv3x3(nn.Module):
    """A 3x3 convolution of stride 1 that keeps the size; its parameters are those of `nn.Conv`: `kernel` and `bias`."""

    features: int
    kernel_init: nn.initializers.Initializer
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w d"]:
        """Return the convolution of feature maps (N, H, W, C): (N, H, W, features) in `dtype`."""
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        return conv3x3(*nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype))


def conv3x3(
    x: Float[Array, "n h w c"], kernel: Float[Array, "3 3 c d"], bias: Float[Array, "d"]
) -> Float[Array, "n h w d"]:
    """Return the 3x3 convolution of stride 1 that keeps the size, on a CPU by the fastest method for its shape.

    Accelerators always use XLA's own convolution. There is no forward-mode derivative (`jax.jvp`).

    Args:
      x: feature maps (N, H, W, C).
      kernel: (3, 3, C, D), in the dtype of `x`.
      bias: (D,), in the dtype of `x`.

    Returns:
      (N, H, W, D), in the dtype of `x`.
    """
    height, width, channels = x.shape[1:]
    work = x.size * kernel.size // channels
    if height <= 2 and width <= 2:
        y: jax.Array = lax.platform_dependent(x, kernel, bias, cpu=_conv_of_tiny_map, default=_conv_by_xla)
        return y
    if channels <= 4:
        return _conv(IM2COL, x, kernel, bias)
    if work < SMALLEST_WORK or height <= 2 or x.dtype not in (jnp.float32, jnp.float64):
        return _conv_by_xla(x, kernel, bias)
    return _conv(WINOGRAD, x, kernel, bias)


def _conv_by_xla(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers) + bias


def _conv_of_tiny_map(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Return the convolution of maps of at most 2x2 by Karatsuba's algorithm along both axes.

    Each output of such a map depends on the whole input. With positions a, b and taps u, v, w, the outputs v a + w b
    and u a + v b equal v (a + b) + (w - v) b and v (a + b) + (u - v) a. These are three products instead of four, and
    nine instead of sixteen along both axes.

    XLA's convolution of 2x2 maps reaches 1 to 3 GFLOP/s. Nine products instead of sixteen reduce inference by VGG-16-BN
    at 32x32, batch 64, from 139 to 126 ms.
    """
    height, width = x.shape[1:3]

    def inputs(x: jax.Array) -> list[jax.Array]:
        a, b = x[:, 0], x[:, -1]
        return [a] if x.shape[1] == 1 else [a + b, b, a]

    def taps(kernel: jax.Array, length: int) -> list[jax.Array]:
        u, v, w = kernel
        return [v] if length == 1 else [v, w - v, u - v]

    def outputs(products: list[jax.Array]) -> list[jax.Array]:
        return products if len(products) == 1 else [products[0] + products[1], products[0] + products[2]]

    columns = [
        outputs([jnp.dot(d, g) for d, g in zip(inputs(row), taps(tap, width), strict=True)])
        for row, tap in zip(inputs(x), taps(kernel, height), strict=True)
    ]
    return jnp.stack([jnp.stack(outputs(list(column)), 1) for column in zip(*columns, strict=True)], 2) + bias


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
IM2COL = Method(
    lambda kernel: kernel.reshape(-1, kernel.shape[-1]),
    lambda x, kernel: _columns(x) @ kernel,
    lambda x, dy: jnp.einsum("nhwc,nhwd->cd", _columns(x), dy),
    lambda gradient: gradient.reshape(3, 3, -1, gradient.shape[-1]),
)
WINOGRAD = Method(winograd.transform, winograd.convolution, winograd.gradient, winograd.kernel_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(method: Method, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Return the convolution by a method, which also computes the gradients; accelerators use XLA's convolution."""
    on_cpu = functools.partial(_conv_by_method, method)
    y: jax.Array = lax.platform_dependent(x, kernel, bias, cpu=on_cpu, default=_conv_by_xla)
    return y


def _conv_backward(method: Method, residuals: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, ...]:
    def by_xla(x: jax.Array, kernel: jax.Array, bias: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        gradients: tuple[jax.Array, ...] = jax.vjp(_conv_by_xla, x, kernel, bias)[1](dy)
        return gradients

    on_cpu = functools.partial(_gradients_by_method, method)
    gradients: tuple[jax.Array, ...] = lax.platform_dependent(*residuals, dy, cpu=on_cpu, default=by_xla)
    return gradients


_conv.defvjp(lambda method, *arguments: (_conv(method, *arguments), arguments), _conv_backward)


def _conv_by_method(method: Method, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    height, width = x.shape[1:3]
    x, kernels = _whole_bands(x), method.transform(kernel)

    def put_band(i: jax.Array, y: jax.Array) -> jax.Array:
        return _with_band(y, i, method.convolution(_band_with_border(x, i), kernels) + bias)

    y: jax.Array
    if _in_bands(x):
        y = lax.fori_loop(0, x.shape[1] // BAND, put_band, _map_of(bias[0], x.shape, kernel.shape[-1]))
    else:
        y = method.convolution(_with_border(x), kernels) + bias
    return y[:, :height, :width]


def _gradients_by_method(
    method: Method, x: jax.Array, kernel: jax.Array, bias: jax.Array, dy: jax.Array
) -> tuple[jax.Array, ...]:
    """Return the gradients of x, kernel and bias.

    One loop computes all three, so that the memory of `dy`, a whole map, is free after it.
    """
    _, height, width, channels = x.shape
    x, dy = _whole_bands(x), _whole_bands(dy)
    # This layout forces XLA to transpose the kernel by a copy. Otherwise the sums of the transform transpose while they
    # read: 22 instead of 2 ms for 512 to 512 channels.
    rows_first = Layout(major_to_minor=(0, 1, 2, 3))
    kernels = method.transform(with_layout_constraint(kernel.swapaxes(2, 3), rows_first)[::-1, ::-1])

    def bias_gradient(dy: jax.Array) -> jax.Array:
        # The sum first runs over whole image rows, because XLA:CPU does not vectorize a sum over all axes but the last.
        return dy.reshape(-1, dy.shape[2] * dy.shape[3]).sum(0).reshape(dy.shape[2:]).sum(0)

    def add_band(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dx, dkernels, dbias = sums
        band = _band(dy, i)
        dx = _with_band(dx, i, method.convolution(_band_with_border(dy, i), kernels))
        return dx, dkernels + method.gradient(_band_with_border(x, i), band), dbias + bias_gradient(band)

    # With several devices that share a batch, the loop would sum over the devices in each band.
    if _in_bands(x) and jax.device_count() == 1:
        zeros = jnp.zeros(jax.eval_shape(method.transform, kernel).shape, x.dtype), jnp.zeros_like(bias)
        sums = (_map_of(kernel[0, 0, 0, 0], x.shape, channels), *zeros)
        dx, dkernels, dbias = lax.fori_loop(0, x.shape[1] // BAND, add_band, sums)
    else:
        dx = method.convolution(_with_border(dy), kernels)
        dkernels, dbias = method.gradient(_with_border(x), dy), bias_gradient(dy)
    return dx[:, :height, :width], method.kernel_gradient(dkernels), dbias


def _in_bands(x: jax.Array) -> bool:
    """Return whether the map is computed 4 rows at a time.

    A band stays in the cache, but each band reads the kernels again. Forward by Winograd's algorithm, all at once -> in
    bands: 224x224x64 batch 8 213 -> 326, 56x56x256 453 -> 561, 32x32x64 batch 64 228 -> 347, 28x28x512 batch 8
    543 -> 458.
    """
    return x.shape[0] * x.shape[2] >= SMALLEST_BAND


def _whole_bands(x: jax.Array) -> jax.Array:
    """Return the map, padded with zeros to a multiple of 4 rows and columns."""
    after = [-length % BAND for length in x.shape[1:3]]
    return jnp.pad(x, ((0, 0), *((0, length) for length in after), (0, 0))) if any(after) else x


def _with_border(x: jax.Array) -> jax.Array:
    """Return the map with a border of zeros, one pixel wide."""
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _band(x: jax.Array, i: jax.Array) -> jax.Array:
    """Return band `i` of the map: (N, 4, W, C)."""
    return lax.dynamic_slice_in_dim(x, i * BAND, BAND, 1)


def _band_with_border(x: jax.Array, i: jax.Array) -> jax.Array:
    """Return band `i` with the pixels around it, which are zeros outside the map: (N, 6, W + 2, C).

    This copy stays in the cache. A copy of the whole map with its border would take as long and need as much memory as
    the map.
    """
    n, height, width, channels = x.shape

    def row(y: jax.Array) -> jax.Array:
        return jnp.where((y >= 0) & (y < height), lax.dynamic_slice_in_dim(x, jnp.clip(y, 0, height - 1), 1, 1), 0)

    band: jax.Array = jnp.zeros((n, BAND + 2, width + 2, channels), x.dtype)
    for first, rows in ((0, row(i * BAND - 1)), (1, _band(x, i)), (BAND + 1, row((i + 1) * BAND))):
        band = lax.dynamic_update_slice(band, rows, (0, first, 1, 0))
    band = lax.optimization_barrier(band)
    return band


def _map_of(value: jax.Array, shape: tuple[int, ...], channels: int) -> jax.Array:
    """Return a map of any value to write bands into.

    Not jnp.zeros: XLA would share one buffer of zeros between all maps and copy it.
    """
    return jnp.broadcast_to(value, (*shape[:3], channels))


def _with_band(y: jax.Array, i: jax.Array, band: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(y, band, i * BAND, 1)
