"""The fully connected layer, and its matrix product."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching
from jaxtyping import Array, Float

from vgg_jax.ops.bias import add_bias
from vgg_jax.ops.primitives import batch_product, define, over_leading_axes, vary_alike

ROWS = 512  # rows of a part of the kernel in the gradient


def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


_product = define(
    "dense_product",
    over_leading_axes(_matmul, 2),
    over_leading_axes(_matmul, 2),
    lambda x, kernel: x.update(shape=(*x.shape[:-1], kernel.shape[-1])),
)


def _input_gradient(dy: jax.Array, kernel: jax.Array) -> jax.Array:
    def in_parts(dy: jax.Array, kernel: jax.Array) -> jax.Array:
        parts = kernel.reshape(-1, ROWS, kernel.shape[1])
        return jnp.einsum("pnd,prd->npr", jnp.broadcast_to(dy, (len(parts), *dy.shape)), parts).reshape(dy.shape[0], -1)

    def whole(dy: jax.Array, kernel: jax.Array) -> jax.Array:
        return dy @ kernel.T

    on_cpu = whole if len(kernel) % ROWS else in_parts
    gradient: jax.Array = lax.platform_dependent(dy, kernel, cpu=on_cpu, default=whole)
    return gradient


ad.defbilinear(
    _product,
    lambda dy, x, kernel: over_leading_axes(_input_gradient, 2)(dy, kernel),
    lambda dy, x, kernel: x.swapaxes(-2, -1) @ dy,
)
batching.primitive_batchers[_product] = functools.partial(batch_product, _product, 2, ((-2, -2), (-1, -1)))


def dense_product(
    x: Float[Array, "n c"], kernel: Float[Array, "c d"], *args: Any, **kwargs: Any
) -> Float[Array, "n d"]:
    """Return the product of two matrices, for `Dense` and for `nn.Dense(dot_general=dense_product)`.

    On a CPU the gradient of `x` is computed in parts of 512 columns. For the whole product XLA copies the kernel to
    transpose it: with the 25,088 x 4,096 kernel of fc6 and a batch of 8, this needs 392 MiB and takes 47 instead of
    17 ms (2 cores of an EPYC).

    Args:
      x: (N, C).
      kernel: (C, D).
      *args: the other arguments of `jax.lax.dot_general`, which are ignored.
      **kwargs: likewise.

    Returns:
      (N, D).
    """
    y: jax.Array = _product.bind(*vary_alike(x, kernel))
    return y


class Dense(nn.Module):
    """A fully connected layer; its parameters are those of `nn.Dense`: `kernel` and `bias`."""

    features: int
    kernel_init: nn.initializers.Initializer
    product: Callable[[jax.Array, jax.Array], jax.Array] = dense_product
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n c"]) -> Float[Array, "n d"]:
        """Return x @ kernel + bias for rows (N, C): (N, features) in `dtype`."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        return add_bias(self.product(x, kernel), bias)
