"""The layers of a network optimized for inference on a CPU: kernels are in the form that the products read.

The form of a kernel follows from its shape, so a network computes maps of any size, whatever size it is optimized for:

| method | shape of the kernel | fastest for |
|---|---|---|
| direct | (3, 3, C, D) | images, and layers with little work |
| im2col | (9 C, D) | maps of 4x4 of one image: it reads the fewest bytes |
| winograd2, winograd4, winograd6 | (16, C, D), (36, C, D), (64, C, D) | larger maps: larger tiles for larger maps |
| karatsuba | (9, C, D) | maps of at most 2x2 |
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from vgg_jax.ops import methods, winograd
from vgg_jax.ops.bilinear import conv_by_xla
from vgg_jax.ops.conv3x3 import Conv1x1
from vgg_jax.ops.dense import Dense
from vgg_jax.ops.layers import FAST, Layers

Shape = tuple[int, ...]
SMALLEST_WORK = 2**22  # multiply-adds of a layer; with less, XLA's convolution costs as little and compiles faster
# A product reads a number of a kernel from memory in the time in which it multiplies so many rows by it: 0.083 ns at 48
# GB/s, and 5 ps at 400 GFLOP/s (2 cores of an EPYC).
ROWS_PER_READ = 17
# Larger tiles are taken only if they save so much, because their error is larger, and only for maps of two tiles in a
# row: on maps of 4x4, F(4x4) would give a third of the whole error of VGG-19 at 32x32.
LEAST_SAVING = 0.1
SMALLEST_TILE = 2
LARGEST_MAP = 2**24  # bytes of a map that is computed at once; a larger one is computed in bands of LARGEST_BAND bytes
LARGEST_BAND = 2**22
DENSE_PARTS = 16  # parts of the rows of a dense layer's kernel, for one image


def choose_method(shape: Shape, features: int) -> str:
    """Return the method of a 3x3 convolution that takes the least time.

    Args:
      shape: that of the maps, (N, H, W, C).
      features: the channels of the output.
    """
    count, height, width, channels = shape
    if height <= 2 and width <= 2:
        return "karatsuba"
    if channels <= 4 or 9 * count * height * width * channels * features < SMALLEST_WORK:
        return "direct"
    best, least = "im2col", 9.0 * (ROWS_PER_READ + count * height * width)
    for rows in winograd.MATRICES:
        if max(height, width) < 2 * rows and rows > SMALLEST_TILE:
            continue
        tiles = count * -(-height // rows) * -(-width // rows)
        cost = (rows + 2) ** 2 * (ROWS_PER_READ + tiles)
        if cost < least * (1 - LEAST_SAVING * (rows > winograd.ROWS)):
            best, least = f"winograd{rows}", cost
    return best


def kernel_shape(shape: Shape, method: str) -> Shape:
    """Return the shape of a kernel (3, 3, C, D) in the form of a method."""
    if method.startswith("winograd"):
        return ((int(method[-1]) + 2) ** 2, *shape[2:])
    return {"direct": shape, "im2col": (9 * shape[2], shape[3]), "karatsuba": (9, *shape[2:])}[method]


def kernel_form(kernel: Float[np.ndarray, "3 3 c d"], method: str, dtype: Any = np.float32) -> np.ndarray:
    """Return a kernel (3, 3, C, D) in the form of a method: computed in float64, and rounded once, to `dtype`."""
    form = np.empty(kernel_shape(kernel.shape, method), dtype)
    if method.startswith("winograd"):
        matrix = winograd.KERNEL_TRANSFORMS[int(method[-1])]
        for channel in range(kernel.shape[2]):
            form[:, channel] = matrix @ kernel[:, :, channel].reshape(9, -1)
    elif method == "karatsuba":
        form[:] = [tap for row in _sums(kernel.astype(np.float64)) for tap in _sums(row)]
    else:
        form[:] = kernel.reshape(form.shape)
    return form


def _sums(taps: Any) -> list[Any]:
    u, v, w = taps
    return [v, v + w, u + v]


def convolution(
    x: Float[Array, "n h w c"], kernel: Shaped[Array, "..."], bias: Float[Array, "d"]
) -> Float[Array, "n h w d"]:
    """Return the 3x3 convolution of stride 1 that keeps the size, by the method of the kernel's form.

    Args:
      x: feature maps (N, H, W, C).
      kernel: as `kernel_form` returns it.
      bias: (D,).

    Returns:
      (N, H, W, D).
    """
    height, width = x.shape[1:3]
    if kernel.ndim == 2:
        return methods.METHODS["im2col"].convolution(methods.with_border(x), kernel) + bias
    if kernel.ndim == 3 and len(kernel) > 9:
        return _by_winograd(x, kernel, bias)[:, :height, :width]
    if kernel.ndim == 3 and height <= 2 and width <= 2:
        return _of_tiny_map(x, kernel.reshape(3, 3, *kernel.shape[1:])) + bias
    return conv_by_xla(x, _taps(kernel) if kernel.ndim == 3 else kernel, bias)


def _taps(kernel: jax.Array) -> jax.Array:
    """Return the kernel (3, 3, C, D) of one in the form for tiny maps (9, C, D)."""

    def along(v: jax.Array, last: jax.Array, first: jax.Array) -> jax.Array:
        return jnp.stack([first - v, v, last - v])

    return along(*(along(*row) for row in kernel.reshape(3, 3, *kernel.shape[1:])))


def _by_winograd(x: jax.Array, kernels: jax.Array, bias: jax.Array) -> jax.Array:
    """Return the convolution by Winograd's algorithm, with the rows and columns that fill up the last tiles."""
    rows = winograd.rows_of(kernels)

    def product(x: jax.Array) -> jax.Array:
        return winograd.convolution(x, kernels) + bias

    n, height, width, channels = x.shape
    features = len(bias)
    row_bytes = n * width * max(channels, features) * x.dtype.itemsize
    if height * row_bytes <= LARGEST_MAP:
        return product(methods.with_border(methods.whole_tiles(x, rows)))
    band = rows * max(1, LARGEST_BAND // (rows * row_bytes))
    x = methods.whole_tiles(x, rows)
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % band), (0, 0), (0, 0)))
    return methods.in_bands(product, x, band, jnp.broadcast_to(bias, (*x.shape[:3], features)))


def _of_tiny_map(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return the convolution of maps of at most 2x2 by Karatsuba's algorithm along both axes: see `ops.conv3x3`.

    With positions a, b and taps u, v, w, the outputs v a + w b and u a + v b are computed as (v + w) b + v (a - b) and
    (u + v) a - v (a - b). After ReLU, differences of pixels are smaller than sums: the logits of VGG-16 at 32x32 have
    four fifths of the error that they have with v (a + b), w - v and u - v.

    All products are one batched product: one image of 32x32 takes VGG-16 3.2 instead of 3.4 ms by im2col.
    """
    height, width = x.shape[1:3]

    def inputs(x: jax.Array) -> list[jax.Array]:
        a, b = x[:, 0], x[:, -1]
        return [a] if x.shape[1] == 1 else [a - b, b, a]

    def outputs(products: Any) -> list[jax.Array]:
        return [products[0]] if len(products) == 1 else [products[1] + products[0], products[2] - products[0]]

    rows = jnp.stack([jnp.stack(inputs(row)) for row in inputs(x)])
    down, across = rows.shape[:2]
    kernel = kernel[:down, :across].reshape(down * across, *kernel.shape[2:])
    products = jnp.matmul(rows.reshape(down * across, *rows.shape[2:]), kernel)
    products = products.reshape(down, across, *products.shape[1:])
    columns = [outputs(products[:, i]) for i in range(across)]
    return jnp.stack([jnp.stack(outputs(list(row)), 1) for row in zip(*columns, strict=True)], 1).reshape(
        x.shape[0], height, width, -1
    )


class InferenceConv(nn.Module):
    """A 3x3 convolution whose parameters are a kernel in the form of a method, and a bias."""

    features: int
    kernel_init: nn.initializers.Initializer
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w d"]:
        """Return the convolution of feature maps (N, H, W, C): (N, H, W, features) in `dtype`."""
        kernel: Any = self.get_variable("params", "kernel")
        bias: Any = self.get_variable("params", "bias")
        if kernel is None or bias is None:
            raise ValueError(
                f"found no kernel of {self.name}; expected the variables of vgg_jax.optimize_for_inference, which a "
                "network cannot initialize: pass those"
            )
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return convolution(x, kernel, bias)


def _conv(features: int, kernel_size: tuple[int, int], **options: Any) -> nn.Module:
    return (InferenceConv if kernel_size == (3, 3) else Conv1x1)(features, **options)


def product_in_parts(
    x: Float[Array, "n c"], kernel: Float[Array, "c d"], precision: str | None = None
) -> Float[Array, "n d"]:
    """Return the product of two matrices, for one row in parts of the kernel's rows.

    The parts take 8.8 instead of 9.5 ms for fc6 of VGG-16, and their error is smaller: the sums are shorter. In the
    whole network, one image of 224x224 takes 45 instead of 50 ms (2 cores of an EPYC).

    Args:
      x: (N, C).
      kernel: (C, D).
      precision: ignored, because a CPU multiplies float32 in float32.

    Returns:
      (N, D).
    """
    if x.shape[0] != 1 or kernel.shape[0] % DENSE_PARTS:
        return jnp.matmul(x, kernel)
    parts = kernel.reshape(DENSE_PARTS, -1, kernel.shape[1])
    return jnp.einsum("pk,pkd->pd", x.reshape(DENSE_PARTS, -1), parts).sum(0, keepdims=True)


def _dense(features: int, **options: Any) -> nn.Module:
    return Dense(features, product=product_in_parts, **options)


INFERENCE = Layers(conv=_conv, norm=FAST.norm, pool=FAST.pool, dense=_dense, relu=FAST.relu)


def check_trainable(folded: bool, optimized: bool) -> None:
    """Raise ValueError if a network that is to be trained is for inference only.

    Args:
      folded: whether convolutions to train contain their batch norm.
      optimized: whether the network is optimized for inference.
    """
    if optimized:
        raise ValueError("the network is optimized for inference; expected the original one: train that one")
    if folded:
        raise ValueError(
            "the convolutions contain their batch norm, which training needs; expected the network before folding: "
            "train that one, or freeze the convolutions"
        )
