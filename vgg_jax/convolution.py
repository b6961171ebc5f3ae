"""The 3x3 convolution of stride 1, and on a CPU the fastest ways known to compute it.

A comment that gives a gain gives it in GFLOP/s of float32 of the direct convolution's work, on one core of an EPYC
(Zen 4, JAX 0.10.1), where a matrix product reaches 90 to 115.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

ROWS = 4  # that Winograd's algorithm computes at once, from ROWS + 2
# Winograd's algorithm is worth the seconds that it takes to compile from so many multiply-adds of a layer, and from two
# images, on. With one of 224x224, VGG-16 gains a tenth, and compiles for 5 s instead of 1.
SMALLEST_WORK = 2**30
SMALLEST_BATCH = 2
LARGE_MAP = 2**23  # elements of a batch of at most 64 channels, beyond which the convolution uses it along one axis


def conv3x3(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """3x3 convolution of stride 1 that keeps the size; on a CPU, by the fastest way known for its shape.

    It has the signature of `jax.lax.conv_general_dilated`, so that `nn.Conv(conv_general_dilated=conv3x3)` owns the
    parameters. Accelerators always take XLA's own convolution. Has no forward-mode derivative (`jax.jvp`).

    Args:
      x: images (N, H, W, C).
      kernel: (3, 3, C, D).
      *args, **kwargs: the rest of `nn.Conv`'s call; strides and dilations are 1 and the padding is SAME.

    Returns:
      (N, H, W, D), in the dtype of `x`.
    """

    def by_xla(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, *args, **kwargs)

    precision = kwargs.get("precision")
    n, height, width, channels = x.shape
    work = x.size * kernel.size // channels
    if height <= 2 and width <= 2:
        by_matrix_products = _conv_of_tiny_map
    elif channels <= 4:
        by_matrix_products = _conv_of_few_channels
    elif work < SMALLEST_WORK or n < SMALLEST_BATCH or height <= 2 or x.dtype not in (jnp.float32, jnp.float64):
        return by_xla(x, kernel)
    else:
        return _winograd(by_xla, precision)(x, kernel)
    on_cpu = functools.partial(by_matrix_products, precision=precision)
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=by_xla)


def _conv_of_tiny_map(x: jax.Array, kernel: jax.Array, precision: Any) -> jax.Array:
    """On a map of at most 2x2, where each output sees the whole input, by Karatsuba's algorithm along both axes.

    Of two positions a, b and taps u, v, w, the outputs v a + w b and u a + v b are v (a + b) + (w - v) b and
    v (a + b) + (u - v) a: three products instead of four, and nine instead of sixteen along both axes.

    XLA's convolution of 2x2 maps reaches 1 to 3 GFLOP/s. Nine products instead of sixteen take inference by VGG-16-BN
    at 32x32, batch 64, from 139 to 126 ms (2 cores).
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
        outputs([jnp.dot(d, g, precision=precision) for d, g in zip(inputs(row), taps(tap, width), strict=True)])
        for row, tap in zip(inputs(x), taps(kernel, height), strict=True)
    ]
    return jnp.stack([jnp.stack(outputs(list(column)), 1) for column in zip(*columns, strict=True)], 2)


def _conv_of_few_channels(x: jax.Array, kernel: jax.Array, precision: Any) -> jax.Array:
    """The first layer as im2col: nine shifted copies side by side, and one matrix product.

    Forward and the kernel's gradient on 2 cores of a Xeon, batch 64, 32x32: 3 channels 24 -> 117, 1 channel 13 -> 64.
    """
    n, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    columns = jnp.concatenate(shifted, axis=-1).reshape(-1, 9 * channels)
    return jnp.dot(columns, kernel.reshape(9 * channels, -1), precision=precision).reshape(n, height, width, -1)


def _toom_cook(points: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Winograd's matrices B^T (6, 6), G (6, 3), A^T (4, 6): A^T (G g * B^T d) are the 4 sums of d (6) with taps g (3).

    g and the gradient of the sums become polynomials, evaluated at the points and at infinity.
    """

    def powers(count: int) -> np.ndarray:
        return np.array([[p**i for i in range(count)] for p in points] + [[0.0] * (count - 1) + [1.0]])

    scale = [np.prod([p - q for q in points if q != p]) for p in points] + [1.0]
    b = np.linalg.inv(powers(ROWS + 2)) * scale
    return np.where(abs(b) > 1e-9, b, 0).T, powers(3) / np.array(scale)[:, None], powers(ROWS).T


# F(4, 3) of Lavin and Gray (arXiv:1509.09308), at other points than theirs, 0, ±1, ±2: the error is a quarter smaller.
B_T, G, A_T = _toom_cook((0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)))


def _winograd(by_xla: Any, precision: Any) -> Any:
    """The convolution by Winograd's algorithm, forward and backward; off a CPU, `by_xla` and its gradients.

    Along one axis it halves the products, for 1.5 times the map to read and to write; along both they are a quarter,
    for 2.25 times. In float32 its error is about 1e-6 of the largest value along one axis, 2e-6 to 5e-6 along both.
    """

    @jax.custom_vjp
    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        on_cpu = functools.partial(_winograd_conv, precision=precision)
        return lax.platform_dependent(x, kernel, cpu=on_cpu, default=by_xla)

    def forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return conv(x, kernel), (x, kernel)

    def gradients_on_cpu(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        # With this layout it is transposed by a copy; else the sums over its rows transpose as they read: 22 ms for 512
        # to 512 channels instead of 2.
        rows_first = Layout(major_to_minor=(0, 1, 2, 3))
        flipped = with_layout_constraint(kernel.swapaxes(2, 3), rows_first)[::-1, ::-1]
        return _winograd_conv(dy, flipped, precision), _winograd_kernel_gradient(x, dy, precision)

    def gradients_by_xla(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vjp(by_xla, x, kernel)[1](dy)

    def backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, ...]:
        return lax.platform_dependent(*residuals, dy, cpu=gradients_on_cpu, default=gradients_by_xla)

    conv.defvjp(forward, backward)
    return conv


def _weighted_sum(weights: np.ndarray, arrays: list[jax.Array]) -> jax.Array:
    terms = [array if w == 1 else float(w) * array for w, array in zip(weights, arrays, strict=True) if w]
    return functools.reduce(jnp.add, terms)


def _taps(kernel: jax.Array, axis: int) -> list[jax.Array]:
    """G g for the three taps g along an axis: six arrays."""
    taps = [lax.index_in_dim(kernel, i, axis, keepdims=False) for i in range(3)]
    return [_weighted_sum(weights, taps) for weights in G]


def _gradient_of_taps(products: list[jax.Array]) -> jax.Array:
    """G^T of the six products: the gradient of the three taps along an axis, which becomes the first.

    As a product of matrices, with the copies that it needs, 36 products of 256x256 took 4.1 ms, as sums 0.9 (2 cores).
    """
    return jnp.stack([_weighted_sum(weights, products) for weights in G.T])


def _input_tiles(x: jax.Array, axis: int) -> list[jax.Array]:
    """B^T d for the tiles d of 6 along an axis, which overlap by 2: six arrays, a quarter as long."""
    count = -(-x.shape[axis] // ROWS)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (1, (count + 1) * ROWS - 1 - x.shape[axis])
    rows = jnp.pad(x, padding).reshape(*x.shape[:axis], count + 1, ROWS, *x.shape[axis + 1 :])

    def row(i: int) -> jax.Array:
        tiles = lax.slice_in_dim(rows, i // ROWS, i // ROWS + count, axis=axis)
        return lax.index_in_dim(tiles, i % ROWS, axis + 1, keepdims=False)

    return [_weighted_sum(weights, [row(i) for i in range(ROWS + 2)]) for weights in B_T]


def _gradient_tiles(dy: jax.Array, axis: int) -> list[jax.Array]:
    """A dy for the tiles of 4 along an axis: six arrays, a quarter as long."""
    count = -(-dy.shape[axis] // ROWS)
    padding = [(0, 0)] * dy.ndim
    padding[axis] = (0, count * ROWS - dy.shape[axis])
    rows = jnp.pad(dy, padding).reshape(*dy.shape[:axis], count, ROWS, *dy.shape[axis + 1 :])
    return [
        _weighted_sum(weights, [lax.index_in_dim(rows, i, axis + 1, keepdims=False) for i in range(ROWS)])
        for weights in A_T.T
    ]


def _output_tiles(products: list[jax.Array], axis: int) -> jax.Array:
    """A^T of the six products: the sums along an axis, four times as long."""
    y = jnp.stack([_weighted_sum(weights, products) for weights in A_T], axis + 1)
    return y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])


def _winograd_conv(x: jax.Array, kernel: jax.Array, precision: Any) -> jax.Array:
    """Along both axes of the image, 36 matrix products; of a large map with few channels, 6 convolutions of its rows.

    On 2 cores, XLA's convolution -> along the columns only -> along both axes, forward: 112x112x128 batch 8 200 -> 273
    -> 374, 28x28x512 193 -> 356 -> 586; 32x32x64 batch 64 194 -> 206 -> 218, 8x8x256 187 -> 298 -> 565, 4x4x512 160 ->
    264 -> 357. At 224x224x64 batch 8, where memory is the limit, 195 -> 235 -> 213. From several runs, some 10 % apart.
    """
    height, width = x.shape[1:3]
    along_rows = _winograd_rows if x.shape[-1] > 64 or x.size <= LARGE_MAP else _conv_of_rows
    # Without the barriers, here and below, XLA would compute the sums again for each element that a product reads.
    rows, taps = lax.optimization_barrier((_input_tiles(x, 1), _taps(kernel, 0)))
    products = [along_rows(row, tap, precision) for row, tap in zip(rows, taps, strict=True)]
    return _output_tiles(lax.optimization_barrier(products), 1)[:, :height, :width]


def _conv_of_rows(x: jax.Array, taps: jax.Array, precision: Any) -> jax.Array:
    """The 1x3 convolution by XLA."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, taps[None], (1, 1), "SAME", dimension_numbers=numbers, precision=precision)


def _winograd_rows(x: jax.Array, taps: jax.Array, precision: Any) -> jax.Array:
    """The 1x3 convolution by Winograd's algorithm; columns may be added at the right."""
    tiles, kernels = lax.optimization_barrier((jnp.stack(_input_tiles(x, 2)), jnp.stack(_taps(taps, 0))))
    # One product of six pairs of matrices: six products are as fast, but compile for a third longer.
    products = jnp.matmul(tiles.reshape(6, -1, x.shape[-1]), kernels, precision=precision)
    return _output_tiles(list(products.reshape(*tiles.shape[:-1], -1)), 2)


def _winograd_kernel_gradient(x: jax.Array, dy: jax.Array, precision: Any) -> jax.Array:
    """Along both axes: 36 matrix products.

    On 2 cores 112x112x128 batch 8 305, 28x28x512 511; 32x32x64 batch 64 156, 16x16x128 305, 8x8x256 410, 4x4x512 389.
    XLA's gradient of the kernel reaches 10 to 76 on one of them.
    """

    def gradient_of_row(row: jax.Array, gradient_row: jax.Array) -> jax.Array:
        both = jnp.stack(_input_tiles(row, 2)), jnp.stack(_gradient_tiles(gradient_row, 2))
        tiles, gradient_tiles = (a.reshape(6, -1, a.shape[-1]) for a in lax.optimization_barrier(both))
        products = jnp.matmul(tiles.swapaxes(1, 2), gradient_tiles, precision=precision)
        return _gradient_of_taps(list(products))

    rows = lax.optimization_barrier((_input_tiles(x, 1), _gradient_tiles(dy, 1)))
    products = [gradient_of_row(*pair) for pair in zip(*rows, strict=True)]
    return _gradient_of_taps(lax.optimization_barrier(products))
