"""The precision of products on accelerators.

By default a GPU multiplies float32 in TF32 (10 bits of mantissa instead of 23), and a TPU in bfloat16 (7 bits).
"""

from typing import Any

import jax
import jax.numpy as jnp

PRECISIONS = ("default", "high", "highest")  # those of jax.lax.Precision, from the fastest to that of float32


def or_default(precision: str | None) -> str | None:
    """Return the precision, or if it is None, that of `jax_default_matmul_precision`, which is None if it is not set.

    The primitives need this: their products are lowered later than called, maybe under another setting.
    """
    default: str | None = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]  # JAX adds it when run
    return default if precision is None else precision


def of_network(precision: str | None, dtype: Any) -> str | None:
    """Return the precision of the products of a network.

    Args:
      precision: "default", "high" or "highest"; None: `jax_default_matmul_precision` if it is set, else "highest".
      dtype: the dtype of the computation. Only float32 has a choice: products of bfloat16 are exact, and those of
        float64 are computed in float64.

    Returns:
      The argument `precision` of JAX's products.
    """
    if jnp.dtype(dtype) != jnp.float32:
        return None
    return or_default(precision) or "highest"
