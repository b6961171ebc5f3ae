"""What the devices do to uint8 images inside the step: crop, flip, normalise. Randomness comes from the key alone."""

import jax
import jax.numpy as jnp
from jax import lax

from vgg_jax.config import DataConfig


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


def color_shift(
    key: jax.Array,
    num_images: int,
    std: float,
    eigenvalues: tuple[float, ...],
    eigenvectors: tuple[tuple[float, ...], ...],
) -> jax.Array:
    """AlexNet's shift of each image's RGB, in units of pixels in [0, 1]: (N, 1, 1, 3) float32.

    Along each principal axis of RGB (a column of `eigenvectors`) by its eigenvalue times a normal number with standard
    deviation `std`. Source: A. Krizhevsky et al., "ImageNet Classification with Deep CNNs", 2012, section 4.1.
    """
    alphas = std * jax.random.normal(key, (num_images, 3))
    shift = (alphas * jnp.array(eigenvalues)) @ jnp.array(eigenvectors).T
    return shift[:, None, None].astype(jnp.float32)


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """(image / 255 - mean) / std per channel: uint8 to float32."""
    return (images.astype(jnp.float32) / 255 - jnp.array(mean, jnp.float32)) / jnp.array(std, jnp.float32)


def augment(key: jax.Array, images: jax.Array, config: DataConfig) -> jax.Array:
    """A training batch, (N, H, W, C) uint8 to float32: random crop, random flip, colour shift, normalisation."""
    crop_key, flip_key, color_key = jax.random.split(key, 3)
    if config.train_view == "pad_crop" and config.pad:
        images = random_crop(crop_key, images, config.pad)
    if config.flip and not config.alternating_flip:  # which the loader does
        images = random_flip(flip_key, images)
    normalized = normalize(images, config.mean, config.std)
    if config.color_shift:
        shift = color_shift(
            color_key, len(images), config.color_shift, config.color_eigenvalues, config.color_eigenvectors
        )
        normalized += shift / jnp.array(config.std, jnp.float32)
    return normalized
