"""Mixup and cutmix on the devices, inside the training step: pairs of images share their pixels and their labels.

The partner of each image is the image before it in the batch, whose order is random. The random numbers depend on the
key alone.
"""

import dataclasses

import jax
import jax.numpy as jnp

from vgg_jax.data.augmentation import Batch, box_mask


@dataclasses.dataclass(frozen=True)
class Mixing:
    """The mixing of a training batch; with both kinds, each takes half of the steps at random."""

    num_classes: int
    mixup: float = 0.0  # alpha: the part of an image in its mixture has the distribution Beta(alpha, alpha); 0: none
    cutmix: float = 0.0  # alpha, likewise; 0: none


def mix(key: jax.Array, batch: Batch, options: Mixing) -> Batch:
    """Combine pairs of images and of labels of a training batch.

    Args:
      key: key of all random numbers.
      batch: `image` (N, H, W, C) float32, `label` (N,) integers or (N, K) floats.
      options: the mixing.

    Returns:
      The batch with mixed `image`, in the shape and dtype of `image`, and mixed `label` (N, K) float32. If labels are
      integers, the entry `answer` (N,) holds the class with the largest part of each mixture.
    """
    kind_key, part_key, box_key = jax.random.split(key, 3)
    images, labels = batch["image"], batch["label"]
    uses_cutmix = jnp.array(not options.mixup)
    alpha: jax.Array | float = options.mixup or options.cutmix
    if options.mixup and options.cutmix:
        uses_cutmix = jax.random.bernoulli(kind_key)
        alpha = jnp.where(uses_cutmix, options.cutmix, options.mixup)
    part = jax.random.beta(part_key, alpha, alpha, dtype=jnp.float32)
    mixed, kept = images, part
    if options.mixup:
        mixed = mixup(images, part)
    if options.cutmix:
        box = cutmix_box(box_key, part, images.shape[1], images.shape[2])
        mixed = jnp.where(uses_cutmix, cutmix(images, box), mixed)
        kept = jnp.where(uses_cutmix, part_outside(box, images.shape[1], images.shape[2]), part)
    if labels.ndim > 1:
        return {**batch, "image": mixed, "label": mixup(labels.astype(jnp.float32), kept)}
    soft = mixup(jax.nn.one_hot(labels, options.num_classes), kept)
    answer = jnp.where(kept >= 0.5, labels, jnp.roll(labels, 1, 0))
    return {**batch, "image": mixed, "label": soft, "answer": answer}


def mixup(arrays: jax.Array, part: jax.Array | float) -> jax.Array:
    """Return `part` of each array plus 1 - `part` of the array before it.

    Args:
      arrays: (N, ...) floats: images or labels.
      part: a scalar from 0 to 1.

    Returns:
      The mixtures, (N, ...) in the dtype of `arrays`.

    Source: H. Zhang et al., "mixup: Beyond Empirical Risk Minimization", arXiv:1710.09412; `MixUp` of torchvision.
    """
    part = jnp.asarray(part, arrays.dtype)
    mixed: jax.Array = jnp.roll(arrays, 1, 0) * (1 - part) + arrays * part
    return mixed


def cutmix_box(key: jax.Array, part: jax.Array | float, height: int, width: int) -> jax.Array:
    """Draw the box that covers 1 - `part` of an image, around any pixel; parts outside the image are dropped.

    Returns:
      top, left, bottom and right, (4,) int32; the last two are those of the first pixel after the box.
    """
    sides = jnp.array([height, width])
    center = jax.random.randint(key, (2,), 0, sides)
    return box_around(center, part, height, width)


def box_around(center: jax.Array, part: jax.Array | float, height: int, width: int) -> jax.Array:
    """Return the box of `cutmix_box` around a center (2,): row and column."""
    sides = jnp.array([height, width])
    half = (0.5 * jnp.sqrt(1 - jnp.asarray(part, jnp.float32)) * sides).astype(jnp.int32)
    return jnp.concatenate([jnp.maximum(center - half, 0), jnp.minimum(center + half, sides)])


def part_outside(box: jax.Array, height: int, width: int) -> jax.Array:
    """Return the part of an image outside a box, a float32 scalar."""
    top, left, bottom, right = box
    part: jax.Array = 1 - ((bottom - top) * (right - left)).astype(jnp.float32) / (height * width)
    return part


def cutmix(images: jax.Array, box: jax.Array) -> jax.Array:
    """Return the images with a box of the image before each.

    Args:
      images: (N, H, W, C) of any dtype.
      box: top, left, bottom and right, (4,) integers.

    Returns:
      The images, (N, H, W, C) in the dtype of `images`.

    Source: S. Yun et al., "CutMix", arXiv:1905.04899; `CutMix` of torchvision.
    """
    _, height, width, _ = images.shape
    inside = box_mask(height, width, box[None, :2], box[None, 2:] - box[None, :2])
    return jnp.where(inside, jnp.roll(images, 1, 0), images)
