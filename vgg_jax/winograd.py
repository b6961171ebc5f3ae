"""Winograd's algorithm for the 3x3 convolution: 36 matrix products instead of the nine of four times as many rows.

F(4x4, 3x3) of Lavin and Gray (arXiv:1509.09308). Tiles of 6x6 pixels, which overlap by 2, give 4x4 outputs each. In
float32 the error is 2e-6 to 5e-6 of the largest value.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ROWS = 4  # and columns, of a tile's outputs


def _toom_cook(points: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Winograd's matrices B^T (6, 6), G (6, 3), A^T (4, 6): A^T (G g * B^T d) are the 4 sums of d (6) with taps g (3).

    g and the gradient of the sums become polynomials, evaluated at the points and at infinity.
    """

    def powers(count: int) -> np.ndarray:
        return np.array([[p**i for i in range(count)] for p in points] + [[0.0] * (count - 1) + [1.0]])

    scale = [np.prod([p - q for q in points if q != p]) for p in points] + [1.0]
    b = np.linalg.inv(powers(ROWS + 2)) * scale
    return np.where(abs(b) > 1e-9, b, 0).T, powers(3) / np.array(scale)[:, None], powers(ROWS).T


# At other points than Lavin and Gray's, 0, ±1, ±2: the error is a quarter smaller.
B_T, G, A_T = _toom_cook((0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)))

# From the nine taps of a kernel g to the 36 of G g G^T; as of the tiles, the column comes first.
KERNEL_TRANSFORM = np.einsum("ri,cj->crij", G, G).reshape(36, 9)


def transform(kernel: jax.Array) -> jax.Array:
    """G g G^T of each 3x3 kernel g: (3, 3, C, D) to (36, C, D).

    512 to 512 channels take 1.5 ms, and sums along one axis and then along the other 3 (2 cores of an EPYC).
    """
    return jnp.tensordot(KERNEL_TRANSFORM.astype(kernel.dtype), kernel.reshape(9, *kernel.shape[2:]), 1)


def convolution(x: jax.Array, kernels: jax.Array) -> jax.Array:
    """From a map with its border (N, H + 2, W + 2, C), H and W multiples of 4, to (N, H, W, D)."""
    tiles = _map_tiles(B_T, x)
    products = jnp.matmul(tiles.reshape(36, -1, x.shape[-1]), kernels)
    products = lax.optimization_barrier(products.reshape(*tiles.shape[:-1], -1))
    _, _, n, height, width, features = products.shape
    rows = _sums(A_T, list(products), 4).reshape(6, n, height, width * ROWS, features)
    rows = lax.optimization_barrier(rows)
    return _sums(A_T, list(rows), 2).reshape(n, height * ROWS, width * ROWS, features)


def gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """That of the transformed kernel, (36, C, D), from a map with its border and the gradient of the output."""
    tiles, gradient_tiles = _map_tiles(B_T, x), _map_tiles(A_T.T, dy)
    tiles, gradient_tiles = (a.reshape(36, -1, a.shape[-1]) for a in (tiles, gradient_tiles))
    return jnp.matmul(tiles.swapaxes(1, 2), gradient_tiles)


def kernel_gradient(gradient: jax.Array) -> jax.Array:
    """That of the kernel, (3, 3, C, D), from that of the transformed one."""
    taps = jnp.tensordot(KERNEL_TRANSFORM.T.astype(gradient.dtype), gradient, 1)
    return taps.reshape(3, 3, *gradient.shape[1:])


def _map_tiles(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """M d M^T of tiles d, one every 4 pixels and as large as M is wide: (N, H, W, C) to (6, 6, N, H', W', C)."""
    size = matrix.shape[1]

    def along(x: jax.Array, axis: int) -> jax.Array:
        last = x.shape[axis] - size + 1
        parts = [lax.slice_in_dim(x, i, i + last, ROWS, axis) for i in range(size)]
        return lax.optimization_barrier(_sums(matrix, parts))

    return along(along(x, 1), 3)


def _sums(matrix: np.ndarray, arrays: Sequence[jax.Array], axis: int = 0) -> jax.Array:
    """For each row of the matrix the sum of the arrays, weighted by it, along a new axis.

    As a product of matrices, with the copies that it needs, it takes four times as long. The barriers around it keep
    XLA from computing sums again for each element that is made of them.
    """

    def weighted(row: np.ndarray) -> jax.Array:
        terms = [array if w == 1 else float(w) * array for w, array in zip(row, arrays, strict=True) if w]
        return sum(terms[1:], terms[0])

    return jnp.stack([weighted(row) for row in matrix], axis)
