"""The addition of a bias, whose gradient is summed in float32."""

import jax
import jax.numpy as jnp


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """Return y + bias, with a gradient of the bias that is summed in at least float32.

    The bias is repeated in float32 and then rounded. So autodiff converts the gradient of `y` to float32 before it sums
    it. A sum in bfloat16 stops to grow at about 256 summands.

    Args:
      y: (..., D).
      bias: (D,).

    Returns:
      (..., D) in the dtype of `y`.
    """
    wide = jnp.broadcast_to(bias.astype(jnp.promote_types(bias.dtype, jnp.float32)), y.shape)
    return y + wide.astype(y.dtype)
