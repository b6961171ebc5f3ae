"""What the devices do to uint8 images inside the step: crop, flip, normalise. Randomness comes from the key alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def random_crop(key: jax.Array, images: jax.Array, pad: int) -> jax.Array:
    """Each image shifted by -pad to pad pixels in both directions, filled with zeros: (N, H, W, C) to the same."""
    n, *shape = images.shape
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corners = jax.random.randint(key, (n, 2), 0, 2 * pad + 1)
    return jax.vmap(lambda image, corner: lax.dynamic_slice(image, (corner[0], corner[1], 0), shape))(padded, corners)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each image mirrored left to right with probability one half."""
    flip = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """(image / 255 - mean) / std per channel: uint8 to float32."""
    return (images.astype(jnp.float32) / 255 - jnp.array(mean, jnp.float32)) / jnp.array(std, jnp.float32)


def augment(
    key: jax.Array, images: jax.Array, *, pad: int, flip: bool, normalize: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """A training batch, (N, H, W, C) uint8 to float32: random crop, random flip, and `normalize`."""
    crop_key, flip_key = jax.random.split(key)
    if pad:
        images = random_crop(crop_key, images, pad)
    if flip:
        images = random_flip(flip_key, images)
    return normalize(images)
