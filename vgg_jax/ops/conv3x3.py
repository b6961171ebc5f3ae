"""The 3x3 convolution of stride 1, on a CPU by the fastest method known for its shape.

Comments give speeds in GFLOP/s of float32, counting the work of the direct convolution, on 2 cores of an EPYC (Zen 4,
JAX 0.10.1). A matrix product reaches about 200 there.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vgg_jax.ops.bilinear import conv_by_method, conv_by_xla
from vgg_jax.ops.precision import or_default
from vgg_jax.ops.sizes import surely

# Winograd's algorithm repays its compile time only from this many multiply-adds per layer. VGG-16, one image of
# 224x224: inference 186 -> 103 ms, compilation 0.7 -> 1.8 s. VGG-16-BN, 16 images of 32x32: inference 55 -> 40 ms,
# compilation 1.2 -> 2.6 s; a training step 242 -> 178 ms, compilation 12.4 -> 15.5 s.
SMALLEST_WORK = 2**29
Convolution = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # maps, kernel, bias -> output
LARGEST_BATCH = 64  # of the symbolic batches whose method is that of their size


class Conv3x3(nn.Module):
    """A 3x3 convolution of stride 1 that keeps the size; its parameters are those of `nn.Conv`: `kernel` and `bias`."""

    features: int
    kernel_init: nn.initializers.Initializer
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w d"]:
        """Return the convolution of feature maps (N, H, W, C): (N, H, W, features) in `dtype`."""
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return conv3x3(x, kernel, bias, self.precision)


class Conv1x1(nn.Module):
    """A 1x1 convolution; its parameters are those of `nn.Conv`: `kernel` and `bias`."""

    features: int
    kernel_init: nn.initializers.Initializer
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w d"]:
        """Return the convolution of feature maps (N, H, W, C): (N, H, W, features) in `dtype`."""
        kernel = self.param("kernel", self.kernel_init, (1, 1, x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return conv_by_xla(x, kernel, bias, or_default(self.precision))


def conv3x3(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "3 3 c d"],
    bias: Float[Array, "d"],
    precision: str | None = None,
) -> Float[Array, "n h w d"]:
    """Return the 3x3 convolution of stride 1 that keeps the size, on a CPU by the fastest method for its shape.

    Accelerators always use XLA's own convolution. All transformations of JAX apply: see `ops.bilinear`.

    Args:
      x: feature maps (N, H, W, C).
      kernel: (3, 3, C, D), in the dtype of `x`.
      bias: (D,), in the dtype of `x`.
      precision: that of XLA's products on accelerators, as in `jax.lax.conv_general_dilated`.

    Returns:
      (N, H, W, D), in the dtype of `x`.
    """
    precision = or_default(precision)
    by_xla = functools.partial(conv_by_xla, precision=precision)
    if surely(lambda: x.shape[1] <= 2 and x.shape[2] <= 2):
        y: jax.Array = lax.platform_dependent(x, kernel, bias, cpu=_conv_of_tiny_map, default=by_xla)
        return y
    if (smallest := _smallest_batch(x, kernel)) is not None:
        by_winograd = functools.partial(conv_by_method, method="winograd", precision=precision)
        by_batch = functools.partial(_conv_by_batch, smallest=smallest, at_least=by_winograd, below=by_xla)
        y = lax.platform_dependent(x, kernel, bias, cpu=by_batch, default=by_xla)
        return y
    method = _method(x, kernel)
    return by_xla(x, kernel, bias) if method is None else conv_by_method(x, kernel, bias, method, precision)


def _method(x: jax.Array | jax.ShapeDtypeStruct, kernel: jax.Array) -> str | None:
    """Return the method for maps that are larger than 2x2, or None for XLA's own convolution.

    A symbolic batch selects Winograd's algorithm if that repays its compile time for one image; see also
    `_smallest_batch`. Maps of symbolic height or width select XLA's convolution, because the methods divide them into
    tiles.
    """
    _, height, width, channels = x.shape
    work = x.size * (kernel.size // channels)
    if not (isinstance(height, int) and isinstance(width, int)):
        return None
    if channels <= 4:
        return "im2col"
    large = height > 2 and surely(lambda: work >= SMALLEST_WORK)
    return "winograd" if large and x.dtype in (jnp.float32, jnp.float64) else None


def _smallest_batch(x: jax.Array, kernel: jax.Array) -> int | None:
    """Return the number of images from which a symbolic batch takes Winograd's algorithm.

    Returns:
      None if the batch is not symbolic, or its size does not matter up to LARGEST_BATCH images.
    """
    batch, *sides, channels = x.shape
    if isinstance(batch, int) or not all(isinstance(side, int) for side in sides):
        return None
    image = jax.ShapeDtypeStruct((LARGEST_BATCH, *sides, channels), x.dtype)
    if _method(image, kernel) != "winograd":
        return None
    work = math.prod(sides) * kernel.size
    return -(-SMALLEST_WORK // work) if work < SMALLEST_WORK else None


def _conv_by_batch(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, *, smallest: int, at_least: Convolution, below: Convolution
) -> jax.Array:
    """Return the convolution by `at_least` for `smallest` images and more, and by `below` for fewer.

    The number of images is known when the program is compiled, and XLA removes the other branch. In VGG-16 at 224x224,
    3 of the 13 convolutions have two branches.
    """
    y: jax.Array = lax.cond(jnp.asarray(x.shape[0]) >= smallest, at_least, below, x, kernel, bias)
    return y


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
