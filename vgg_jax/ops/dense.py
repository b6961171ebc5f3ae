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
from vgg_jax.ops.precision import or_default
from vgg_jax.ops.primitives import batch_product, define, over_leading_axes, vary_alike

ROWS = 512  # rows of a part of the kernel in the gradient


def _matmul(x: jax.Array, kernel: jax.Array, *, precision: str | None) -> jax.Array:
    return jnp.matmul(x, kernel, precision=precision)


_product = define(
    "dense_product",
    over_leading_axes(_matmul, 2),
    over_leading_axes(_matmul, 2),
    lambda x, kernel, **_: x.update(shape=(*x.shape[:-1], kernel.shape[-1])),
    ["precision"],
)


def _input_gradient(dy: jax.Array, kernel: jax.Array, *, precision: str | None) -> jax.Array:
    def in_parts(dy: jax.Array, kernel: jax.Array) -> jax.Array:
        parts = kernel.reshape(-1, ROWS, kernel.shape[1])
        return jnp.einsum("pnd,prd->npr", jnp.broadcast_to(dy, (len(parts), *dy.shape)), parts).reshape(dy.shape[0], -1)

    def whole(dy: jax.Array, kernel: jax.Array) -> jax.Array:
        return _matmul(dy, kernel.T, precision=precision)

    on_cpu = whole if len(kernel) % ROWS else in_parts
    gradient: jax.Array = lax.platform_dependent(dy, kernel, cpu=on_cpu, default=whole)
    return gradient


ad.defbilinear(
    _product,
    lambda dy, x, kernel, **params: over_leading_axes(_input_gradient, 2)(dy, kernel, **params),
    lambda dy, x, kernel, **params: _matmul(x.swapaxes(-2, -1), dy, **params),
)
batching.primitive_batchers[_product] = functools.partial(batch_product, _product, 2, ((-2, -2), (-1, -1)))


def dense_product(
    x: Float[Array, "n c"], kernel: Float[Array, "c d"], *args: Any, precision: str | None = None, **kwargs: Any
) -> Float[Array, "n d"]:
    """Return the product of two matrices, for `Dense` and for `nn.Dense(dot_general=dense_product)`.

    On a CPU the gradient of `x` is computed in parts of 512 columns. For the whole product XLA copies the kernel to
    transpose it: with the 25,088 x 4,096 kernel of fc6 and a batch of 8, this needs 392 MiB and takes 47 instead of
    17 ms (2 cores of an EPYC).

    Args:
      x: (N, C).
      kernel: (C, D).
      *args: the other arguments of `jax.lax.dot_general`, which are ignored.
      precision: that of the product and of its derivatives on accelerators, as in `jax.lax.dot_general`.
      **kwargs: likewise.

    Returns:
      (N, D).
    """
    y: jax.Array = _product.bind(*vary_alike(x, kernel), precision=or_default(precision))
    return y


class Dense(nn.Module):
    """A fully connected layer; its parameters are those of `nn.Dense`: `kernel` and `bias`."""

    features: int
    kernel_init: nn.initializers.Initializer
    product: Callable[..., jax.Array] = dense_product
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n c"]) -> Float[Array, "n d"]:
        """Return x @ kernel + bias for rows (N, C): (N, features) in `dtype`."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        return add_bias(self.product(x, kernel, precision=self.precision), bias)
