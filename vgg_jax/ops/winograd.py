"""Winograd's algorithm for the 3x3 convolution, a quarter of the multiplications of the direct convolution.

This is F(4x4, 3x3) of Lavin and Gray (arXiv:1509.09308). Each tile of 6x6 pixels gives 4x4 outputs; neighboring tiles
overlap by 2 pixels. The 36 pixels of all tiles make 36 matrix products. In float32 the error is 2e-6 to 5e-6 of the
largest output.

Inference also uses F(2x2, 3x3) and F(6x6, 3x3): 4/9 and 16/81 of the multiplications. The number of transformed kernels
states which: (rows + 2)^2.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped

ROWS = 4  # rows, and columns, of the outputs of a tile


def _toom_cook(points: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return Winograd's matrices B^T (m + 2, m + 2), G (m + 2, 3) and A^T (m, m + 2) for m + 1 points and infinity.

    A^T (G g * B^T d) is the correlation (m,) of a signal d (m + 2,) with taps g (3,). The taps and the gradient of the
    correlation are polynomials, which the matrices evaluate at the points.
    """
    rows = len(points) - 1

    def powers(count: int) -> np.ndarray:
        return np.array([[p**i for i in range(count)] for p in points] + [[0.0] * (count - 1) + [1.0]])

    scale = [np.prod([p - q for q in points if q != p]) for p in points] + [1.0]
    b = np.linalg.inv(powers(rows + 2)) * scale
    return np.where(abs(b) > 1e-9, b, 0).T, powers(3) / np.array(scale)[:, None], powers(rows).T


# By the rows of the outputs of a tile. With these points of 4 rows the error is a quarter smaller than with those of
# Lavin and Gray: 0, 1, -1, 2, -2.
MATRICES = {
    2: _toom_cook((0.0, 1.0, -1.0)),
    ROWS: _toom_cook((0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))),
    6: _toom_cook((0.0, 0.5, -0.5, 1.0, -1.0, 2.0, -2.0)),
}
B_T, _, A_T = MATRICES[ROWS]

# By the rows: from the 9 taps of a kernel g to the numbers of G g G^T, in column-major order as in the tiles.
KERNEL_TRANSFORMS = {rows: np.einsum("ri,cj->crij", g, g).reshape(-1, 9) for rows, (_, g, _) in MATRICES.items()}


def transform(kernel: Float[Array, "3 3 c d"]) -> Float[Array, "36 c d"]:
    """Return G g G^T of each 3x3 kernel g: (3, 3, C, D) to (36, C, D).

    One matrix product takes 1.5 ms for 512 to 512 channels; sums along one axis and then along the other take 3 ms
    (2 cores of an EPYC).
    """
    return jnp.tensordot(KERNEL_TRANSFORMS[ROWS].astype(kernel.dtype), kernel.reshape(9, *kernel.shape[2:]), 1)


def rows_of(kernels: Shaped[Array, "k c d"]) -> int:
    """Return the rows of the outputs of a tile, given the transformed kernels ((rows + 2)^2, C, D)."""
    return math.isqrt(len(kernels)) - 2


def convolution(
    x: Float[Array, "n rows columns c"], kernels: Float[Array, "k c d"]
) -> Float[Array, "n rows-2 columns-2 d"]:
    """Return the convolution of maps with a border by transformed kernels.

    Args:
      x: feature maps (N, H + 2, W + 2, C); H and W are multiples of the rows of a tile, usually 4.
      kernels: the transformed kernels ((rows + 2)^2, C, D).

    Returns:
      (N, H, W, D).
    """
    rows = rows_of(kernels)
    b_t, _, a_t = MATRICES[rows]
    tiles = _map_tiles(b_t, x, rows)
    products = jnp.matmul(tiles.reshape(len(kernels), -1, x.shape[-1]), kernels)
    products = lax.optimization_barrier(products.reshape(*tiles.shape[:-1], -1))
    _, _, n, height, width, features = products.shape
    sums = _sums(a_t, list(products), 4).reshape(rows + 2, n, height, width * rows, features)
    sums = lax.optimization_barrier(sums)
    return _sums(a_t, list(sums), 2).reshape(n, height * rows, width * rows, features)


def gradient(x: Float[Array, "n rows columns c"], dy: Float[Array, "n rows-2 columns-2 d"]) -> Float[Array, "36 c d"]:
    """Return the gradient of the transformed kernels.

    Args:
      x: feature maps with their border (N, H + 2, W + 2, C).
      dy: the gradient of the output (N, H, W, D).

    Returns:
      (36, C, D).
    """
    tiles, gradient_tiles = _map_tiles(B_T, x), _map_tiles(A_T.T, dy)
    tiles, gradient_tiles = (a.reshape(36, -1, a.shape[-1]) for a in (tiles, gradient_tiles))
    return jnp.matmul(tiles.swapaxes(1, 2), gradient_tiles)


def kernel_gradient(gradient: Float[Array, "36 c d"]) -> Float[Array, "3 3 c d"]:
    """Return the gradient of the kernels (3, 3, C, D), given the gradient of the transformed kernels (36, C, D)."""
    taps = jnp.tensordot(KERNEL_TRANSFORMS[ROWS].T.astype(gradient.dtype), gradient, 1)
    return taps.reshape(3, 3, *gradient.shape[1:])


def _map_tiles(matrix: np.ndarray, x: jax.Array, rows: int = ROWS) -> jax.Array:
    """Return M d M^T of each tile d: (N, H, W, C) to (rows + 2, rows + 2, N, H', W', C).

    A tile begins every `rows` pixels and is as large as M is wide.
    """
    size = matrix.shape[1]

    def along(x: jax.Array, axis: int) -> jax.Array:
        last = x.shape[axis] - size + 1
        parts = [lax.slice_in_dim(x, i, i + last, rows, axis) for i in range(size)]
        sums: jax.Array = lax.optimization_barrier(_sums(matrix, parts))
        return sums

    return along(along(x, 1), 3)


def _sums(matrix: np.ndarray, arrays: Sequence[jax.Array], axis: int = 0) -> jax.Array:
    """Return, for each row of the matrix, the sum of the arrays weighted by the row, stacked along a new axis.

    A matrix product takes four times as long, because it needs copies. The callers put barriers around the sums:
    otherwise XLA computes a sum again for each element that depends on it.
    """

    def weighted(row: np.ndarray) -> jax.Array:
        terms = [array if w == 1 else float(w) * array for w, array in zip(row, arrays, strict=True) if w]
        return sum(terms[1:], terms[0])

    return jnp.stack([weighted(row) for row in matrix], axis)
