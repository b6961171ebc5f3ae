"""Evaluation of a network: over a whole split of one view, and by the protocols of the paper's section 4.

Dense evaluation applies the fully connected layers as convolutions to the whole image and averages the class scores
over its positions; multi-crop evaluation averages the posteriors of a grid of crops. Both average over the image and
its mirror image, and over scales. Dense evaluation and the network's own adaptive pooling are different functions of
an image that is larger than the network's input.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax.model import VGG

Batch = dict[str, jax.Array]
Variables = Any

GRID = 5  # crops in each direction


def evaluate(step: Callable[[Batch], dict[str, jax.Array]], batches: Iterable[Batch]) -> dict[str, float]:
    """The mean `loss` and `accuracy` over all examples, and their `count`.

    Args:
      step: `eval_step` of a state: from a batch to the sums over it.
      batches: each example once; those of weight 0 do not count.
    """
    sums: list[dict[str, np.ndarray]] = []
    unread: dict[str, jax.Array] | None = None
    for batch in batches:
        # One step ahead. XLA:CPU allocates the temporary arrays of a step when it is dispatched: of all steps at once.
        unread, last = step(batch), unread
        sums += [jax.device_get(last)] if last else []
    sums += [jax.device_get(unread)] if unread else []
    loss, correct, count = (sum(float(s[key]) for s in sums) for key in ("loss", "correct", "count"))
    return {"loss": loss / count, "accuracy": correct / count, "count": int(count)}


def centre_posteriors(model: VGG, variables: Variables, images: jax.Array) -> jax.Array:
    """The posteriors of the network as it is trained, of images of its size (N, H, W, C): (N, num_classes)."""
    logits = model.apply(variables, images)
    assert isinstance(logits, jax.Array)
    return jax.nn.softmax(logits)


def dense_scores(model: VGG, variables: Variables, images: jax.Array) -> jax.Array:
    """The scores of the network as a fully convolutional one, averaged over all positions.

    Args:
      model: a network with classes.
      variables: its variables.
      images: (N, H, W, C), normalised, of any size whose last map is at least `pool_size` in both directions.

    Returns:
      (N, num_classes), before the softmax.

    Raises:
      ValueError: where the images are too small.
    """
    x = model.apply(variables, images, last_layer=model.stages[-1][-1].name)
    assert isinstance(x, jax.Array)
    size = model.pool_size
    if min(x.shape[1:3]) < size:
        smallest = size * 2 ** len(model.pool_after)
        raise ValueError(f"images have shape {images.shape}; expected H and W of at least {smallest}")
    for layer in model.head:
        if layer.kind == "relu":
            x = jax.nn.relu(x)
        elif layer.kind == "dense":
            parameters = variables["params"][layer.name]
            kernel = parameters["kernel"].astype(x.dtype).reshape(size, size, x.shape[-1], -1)
            dimensions = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=dimensions)
            x += parameters["bias"].astype(x.dtype)
            size = 1  # of the layers after the first
    return x.mean((1, 2))


def dense_posteriors(model: VGG, variables: Variables, images: jax.Array) -> jax.Array:
    """The posteriors of dense evaluation, averaged over each image and its mirror image: (N, num_classes)."""
    both = [jax.nn.softmax(dense_scores(model, variables, x)) for x in (images, images[:, :, ::-1])]
    return (both[0] + both[1]) / 2


def crop_posteriors(model: VGG, variables: Variables, crops: jax.Array) -> jax.Array:
    """The mean posteriors of the crops (N, H, W, C) of one image and of their mirror images: (num_classes,)."""
    return centre_posteriors(model, variables, jnp.concatenate([crops, crops[:, :, ::-1]])).mean(0)


def crop_corners(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """The (top, left) of the crops of `size` x `size` on a regular grid of 5x5, from edge to edge, row by row."""
    tops, lefts = ([(i * (length - size) + 2) // (GRID - 1) for i in range(GRID)] for length in (height, width))
    return [(top, left) for top in tops for left in lefts]


def grid_crops(image: np.ndarray, size: int) -> np.ndarray:
    """The 25 crops of an image (H, W, C): (25, size, size, C)."""
    corners = crop_corners(image.shape[0], image.shape[1], size)
    return np.stack([image[top : top + size, left : left + size] for top, left in corners])


def fuse(posteriors: Iterable[np.ndarray]) -> np.ndarray:
    """The mean of the posteriors of several networks, each (N, num_classes)."""
    arrays = [np.asarray(array, np.float64) for array in posteriors]
    return np.mean(arrays, axis=0)


def top_k_error(posteriors: np.ndarray, labels: np.ndarray, k: int) -> float:
    """The share of examples whose label is not among the k most probable classes; of equals the lower class is first.

    Args:
      posteriors: (N, num_classes).
      labels: (N,) integers.
      k: how many classes count.
    """
    best = np.argsort(-posteriors, axis=1, kind="stable")[:, :k]
    return float(1 - (best == labels[:, None]).any(1).mean())


def confusion_matrix(posteriors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How often each class (row) is taken for each (column): (num_classes, num_classes) integers."""
    classes = posteriors.shape[1]
    pairs = labels * classes + posteriors.argmax(1)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
