"""Gram matrices of activations."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def gram_matrix(maps: Float[Array | np.ndarray, "n h w c"]) -> Float[Array, "n c c"]:
    """Return the inner products of all pairs of channels over all positions, divided by H * W * C.

    Args:
      maps: (N, H, W, C) activations.

    Returns:
      (N, C, C), in at least float32, because sums of float16 overflow above 65,504.

    Source:
      Johnson et al. (2016), section 3.2.
    """
    _, height, width, channels = maps.shape
    dtype = jnp.promote_types(maps.dtype, jnp.float32)
    products = jnp.einsum(
        "nhwc,nhwd->ncd", maps, maps, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype
    )
    return products / (height * width * channels)
