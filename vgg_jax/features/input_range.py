"""The range of the values of images that are passed to a loss."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from vgg_jax.errors import UserError

Range: TypeAlias = tuple[int | float, int | float]  # the values of black and of white


def rescale(
    images: Shaped[Array | np.ndarray, "*batch h w c"],
    source: Range,
    target: Range,
    dtype: Any,
    check: bool,
) -> Float[Array, "*batch h w c"]:
    """Return images with another range of values.

    Args:
      images: (..., H, W, C) floats.
      source: the values of black and of white in `images`.
      target: their values in the result.
      dtype: the dtype of the network; the result has at least float32.
      check: raise an error if a value lies outside `source`; not inside `jit`.

    Raises:
      UserError: if `source` is not two rising numbers, the images are not floats, or a value lies outside.
    """
    low, high = source
    if not low < high:
        raise UserError(f"input_range is {source}; expected the values of black and of white, such as (-1, 1)")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"images are {images.dtype}; expected floats in {source}; convert them first")
    if check:
        _check(images, low, high)
    wide = jnp.asarray(images, jnp.promote_types(jnp.promote_types(images.dtype, dtype), jnp.float32))
    if source != target:
        wide = (wide - low) * ((target[1] - target[0]) / (high - low)) + target[0]
    return wide


def _check(images: Any, low: int | float, high: int | float) -> None:
    if isinstance(images, jax.core.Tracer):
        raise UserError(
            "check_range reads the images, which have no values inside jit, grad or vmap: check them before"
        )
    smallest, largest = float(np.min(images)), float(np.max(images))
    if not (low <= smallest and largest <= high):
        raise UserError(
            f"images have values from {smallest:g} to {largest:g}; expected input_range, {low:g} to {high:g}"
        )
