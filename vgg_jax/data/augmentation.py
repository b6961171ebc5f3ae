"""Augmentation and normalization of uint8 images on the devices, inside the training step.

The random numbers depend on the key alone.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vgg_jax.ops.forms import by_platform

Batch = dict[str, jax.Array]  # image and label


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The augmentation of a training batch.

    The color shift's default axes are those of ImageNet's RGB values in [0, 1]. They have one row for each of R, G and
    B, and one column for each eigenvalue.
    """

    mean: tuple[float, ...]  # of each channel, for pixels in [0, 1]
    std: tuple[float, ...]
    pad: int = 0  # pixels on each side of the image before the random crop; 0 disables the crop
    pad_mode: str = "zeros"  # their values: zeros, or reflect (the image reflected at its edge)
    cutout: int = 0  # side of a random square of the mean color; 0 disables the square
    erasing: float = 0.0  # probability of a random rectangle of the mean color; 0 disables the rectangle
    erasing_area: tuple[float, float] = (0.02, 0.33)  # smallest and largest part of the image
    erasing_aspect: tuple[float, float] = (0.3, 3.3)  # smallest and largest ratio of height to width
    flip: bool = False  # horizontal flip with probability 0.5
    color_shift: float = 0.0  # standard deviation of the factors of the eigenvalues; 0 disables the shift
    color_eigenvalues: tuple[float, ...] = (0.2175, 0.0188, 0.0045)
    color_eigenvectors: tuple[tuple[float, ...], ...] = (
        (-0.5675, 0.7192, 0.4009),
        (-0.5808, -0.0045, -0.8140),
        (-0.5836, -0.6948, 0.4203),
    )


def random_crop(key: jax.Array, images: jax.Array, pad: int, pad_mode: str = "zeros") -> jax.Array:
    """Shift each image by -pad to pad pixels in both directions and fill the border.

    Args:
      key: key of the random offsets.
      images: (N, H, W, C) of any dtype.
      pad: largest shift in pixels.
      pad_mode: values of the border: zeros; or reflect, the image reflected at its edge without repeating the edge.

    Returns:
      The shifted images, (N, H, W, C) in the dtype of `images`.
    """
    mode = "constant" if pad_mode == "zeros" else pad_mode
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode=mode)
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * pad + 1)
    crops: jax.Array = by_platform("random_crop", crop_forms(pad), padded, corners)
    return crops


def crop_forms(pad: int) -> dict[str, Callable[[jax.Array, jax.Array], jax.Array]]:
    """Return the forms of the crop, which all give the same pixels.

    Args:
      pad: pixels of padding on each side of the images.

    Returns:
      By name, functions from images (N, H + 2 pad, W + 2 pad, C) and corners (N, 2) to crops (N, H, W, C).
    """

    def slices(images: jax.Array, corners: jax.Array) -> jax.Array:
        """Return one slice of each image; JAX lowers all of them as one gather."""
        _, *padded, channels = images.shape
        shape = (*(side - 2 * pad for side in padded), channels)
        return jax.vmap(lambda image, corner: lax.dynamic_slice(image, (*corner, 0), shape))(images, corners)

    def along(choose: Callable[[jax.Array, jax.Array, int], jax.Array], images: jax.Array, corners: jax.Array) -> Any:
        for axis in (1, 2):
            images = choose(images, corners[:, axis - 1], axis)
        return images

    def take(images: jax.Array, first: jax.Array, axis: int) -> jax.Array:
        """Return the rows or columns from the first one on, by a gather of whole rows or columns."""
        places = first[:, None] + jnp.arange(images.shape[axis] - 2 * pad)
        return jnp.take_along_axis(images, jnp.expand_dims(places, [i for i in (1, 2, 3) if i != axis]), axis)

    def multiply(images: jax.Array, first: jax.Array, axis: int) -> jax.Array:
        """Return the same by products with zeros and ones, which are exact: each output has one summand."""
        side = images.shape[axis]
        ones = jnp.arange(side) == (first[:, None] + jnp.arange(side - 2 * pad))[:, :, None]
        dtype = jnp.bfloat16 if images.dtype == jnp.uint8 else jnp.promote_types(images.dtype, jnp.float32)
        equation = "npq,nqwc->npwc" if axis == 1 else "npq,nhqc->nhpc"
        product = jnp.einsum(equation, ones.astype(dtype), images.astype(dtype), precision=lax.Precision.HIGHEST)
        return product.astype(images.dtype)

    def select(images: jax.Array, first: jax.Array, axis: int) -> jax.Array:
        """Return the same by a selection among the 2 pad + 1 shifted images."""
        side = images.shape[axis] - 2 * pad
        chosen, first = lax.slice_in_dim(images, 0, side, axis=axis), first[:, None, None, None]
        for shift in range(1, 2 * pad + 1):
            chosen = jnp.where(first == shift, lax.slice_in_dim(images, shift, shift + side, axis=axis), chosen)
        return chosen

    by_axis = {"gathers": take, "products": multiply, "selections": select}
    return {"slices": slices, **{name: functools.partial(along, choose) for name, choose in by_axis.items()}}


def random_horizontal_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Flip each image horizontally with probability 0.5.

    Args:
      key: key of the random choices.
      images: (N, H, W, C) of any dtype.

    Returns:
      The images, (N, H, W, C) in the dtype of `images`.
    """
    flip = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def cutout(key: jax.Array, images: jax.Array, side: int) -> jax.Array:
    """Set a random square of each image to zeros.

    The center of the square is any pixel of the image. Parts of the square outside the image are dropped.

    Args:
      key: key of the random centers.
      images: normalized images (N, H, W, C), whose mean color is zero.
      side: side of the square in pixels.

    Returns:
      The images, (N, H, W, C) in the dtype of `images`.

    Source: T. DeVries and G. Taylor, arXiv:1708.04552.
    """
    num_images, height, width, _ = images.shape
    first = jax.random.randint(key, (num_images, 2), 0, jnp.array([height, width])) - side // 2

    return jnp.where(box_mask(height, width, first, side), jnp.zeros((), images.dtype), images)


def box_mask(height: int, width: int, first: jax.Array, sides: jax.Array | int) -> jax.Array:
    """Return which pixels of images lie in a box.

    Args:
      height: the height of the images.
      width: the width of the images.
      first: (N, 2) integers, row and column of the first pixel of each box, which may lie outside the image.
      sides: (N, 2) integers, the height and width of each box, or the side of all boxes.

    Returns:
      (N, height, width, 1) booleans.
    """

    def covered(length: int, axis: int) -> jax.Array:
        offsets = jnp.arange(length) - first[:, axis, None]
        return (offsets >= 0) & (offsets < (sides if isinstance(sides, int) else sides[:, axis, None]))

    # Comparisons instead of a gather or a scatter, so that accelerators fuse them with the normalization.
    box = covered(height, 0)[:, :, None] & covered(width, 1)[:, None]
    return box[..., None]


def random_erasing(
    key: jax.Array, images: jax.Array, probability: float, areas: tuple[float, float], aspects: tuple[float, float]
) -> jax.Array:
    """Set a random rectangle of some images to zeros, as `torchvision.transforms.RandomErasing`.

    Args:
      key: key of all random numbers.
      images: normalized images (N, H, W, C), whose mean color is zero.
      probability: probability that an image has a rectangle.
      areas: smallest and largest part of the image that the rectangle covers; uniform.
      aspects: smallest and largest ratio of its height to its width; the logarithm is uniform.

    Returns:
      The images, (N, H, W, C) in the dtype of `images`.

    Source: Z. Zhong et al., "Random Erasing Data Augmentation", arXiv:1708.04896.
    """
    num_images, height, width, _ = images.shape
    choice_key, box_key = jax.random.split(key)
    first, sides = erasing_boxes(box_key, num_images, height, width, areas, aspects)
    erased = jax.random.bernoulli(choice_key, probability, (num_images, 1, 1, 1))
    return jnp.where(erased & box_mask(height, width, first, sides), jnp.zeros((), images.dtype), images)


def erasing_boxes(
    key: jax.Array, count: int, height: int, width: int, areas: tuple[float, float], aspects: tuple[float, float]
) -> tuple[jax.Array, jax.Array]:
    """Draw the rectangles of random erasing, each the first of ten that fits into the image.

    Returns:
      Row and column of the first pixel, (N, 2) int32, and height and width, (N, 2) int32, which are 0 if none fits.
    """
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    low, high = (math.log(aspect) for aspect in aspects)
    area = height * width * jax.random.uniform(area_key, (count, 10), minval=areas[0], maxval=areas[1])
    aspect = jnp.exp(jax.random.uniform(aspect_key, (count, 10), minval=low, maxval=high))
    drawn = jnp.round(jnp.sqrt(jnp.stack([area * aspect, area / aspect], -1))).astype(jnp.int32)
    full = jnp.array([height, width])
    fits = (drawn < full).all(-1)
    chosen = jnp.take_along_axis(drawn, fits.argmax(1)[:, None, None], 1)[:, 0]
    sides = jnp.where(fits.any(1)[:, None], chosen, 0)
    return jax.random.randint(place_key, (count, 2), 0, full - sides + 1), sides


def color_shift(
    key: jax.Array,
    num_images: int,
    std: float,
    eigenvalues: tuple[float, ...],
    eigenvectors: tuple[tuple[float, ...], ...],
) -> jax.Array:
    """Draw AlexNet's color shift of each image.

    The shift along each principal axis of RGB is the axis's eigenvalue times a normal number.

    Args:
      key: key of the random numbers.
      num_images: number N of images.
      std: standard deviation of the normal numbers.
      eigenvalues: the three eigenvalues of the covariance of RGB values in [0, 1].
      eigenvectors: three rows of three; the columns are the principal axes.

    Returns:
      The shifts of RGB values in [0, 1], (N, 1, 1, 3) float32.

    Source: A. Krizhevsky et al., "ImageNet Classification with Deep CNNs", 2012, section 4.1.
    """
    alphas = std * jax.random.normal(key, (num_images, 3))
    shift = (alphas * jnp.array(eigenvalues)) @ jnp.array(eigenvectors).T
    return shift[:, None, None].astype(jnp.float32)


def normalize(images: jax.Array | np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Return (images / 255 - mean) / std.

    Args:
      images: (..., C) uint8.
      mean: mean of each channel, for pixels in [0, 1].
      std: standard deviation of each channel, for pixels in [0, 1].

    Returns:
      The normalized images, (..., C) float32.
    """
    return (jnp.asarray(images, jnp.float32) / 255 - jnp.array(mean, jnp.float32)) / jnp.array(std, jnp.float32)


def augment(key: jax.Array, batch: Batch, options: Augmentation) -> Batch:
    """Augment and normalize a training batch: random crop, horizontal flip, normalization, color shift, erased parts.

    Args:
      key: key of all random numbers.
      batch: `image` (N, H, W, C) uint8, `label` (N,) int32 or (N, K) float32.
      options: the augmentation.

    Returns:
      The batch with `image` (N, H, W, C) float32; all other entries are unchanged.
    """
    crop_key, flip_key, color_key = jax.random.split(key, 3)
    images = batch["image"]
    if options.pad:
        images = random_crop(crop_key, images, options.pad, options.pad_mode)
    if options.flip:
        images = random_horizontal_flip(flip_key, images)
    normalized = normalize(images, options.mean, options.std)
    if options.color_shift:
        shift = color_shift(
            color_key, len(images), options.color_shift, options.color_eigenvalues, options.color_eigenvectors
        )
        normalized += shift / jnp.array(options.std, jnp.float32)
    if options.cutout:
        # A key of its own leaves all other random numbers unchanged.
        normalized = cutout(jax.random.fold_in(key, 3), normalized, options.cutout)
    if options.erasing:
        erasing_key = jax.random.fold_in(key, 4)
        areas, aspects = options.erasing_area, options.erasing_aspect
        normalized = random_erasing(erasing_key, normalized, options.erasing, areas, aspects)
    return {**batch, "image": normalized}
