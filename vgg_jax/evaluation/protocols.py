"""The evaluation protocols of the paper's section 4, for images in memory.

Dense evaluation applies the fully connected layers as convolutions to the whole image and averages the class scores
over all positions. Multi-crop evaluation averages the posteriors of a grid of crops. Both average over the image and
its horizontal flip, and over scales. For an image larger than the network's input, dense evaluation differs from the
network's own adaptive pooling.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from vgg_jax.errors import UserError
from vgg_jax.model import VGG
from vgg_jax.ops.precision import of_network

PROTOCOLS = ("center_crop", "dense", "multi_scale", "multi_crop", "dense+multi_crop")
GRID = 5  # crops in each direction


def read_outputs(logits: Float[Array, "n classes"], outputs: str) -> Float[Array, "n classes"]:
    """Return probabilities of logits, or the logits themselves if they are `values`.

    Args:
      logits: (N, num_classes).
      outputs: what the logits mean: softmax (one class is right), sigmoid (each output for itself) or values.
    """
    if outputs == "values":
        return logits
    return jax.nn.sigmoid(logits) if outputs == "sigmoid" else jax.nn.softmax(logits)


def center_posteriors(
    model: VGG,
    variables: Mapping[str, Any],
    images: Float[Array | np.ndarray, "n h w c"],
    outputs: str = "softmax",
    flip: bool = False,
) -> Float[Array, "n classes"]:
    """Return the posteriors of the network as it was trained.

    Args:
      model: a network with classes.
      variables: its variables.
      images: (N, H, W, C), normalized, of the network's input size.
      outputs: what the logits mean: softmax, sigmoid or values.
      flip: average the logits of each image and its horizontal flip, as a run with `flip_eval` does.

    Returns:
      (N, num_classes) probabilities; for `values`, the numbers themselves.
    """
    views = [images, images[:, :, ::-1]] if flip else [images]
    logits = [jnp.asarray(model.apply(variables, view)) for view in views]
    return read_outputs(jnp.stack(logits).mean(0), outputs)


def dense_scores(
    model: VGG, variables: Mapping[str, Any], images: Float[Array | np.ndarray, "n h w c"]
) -> Float[Array, "n classes"]:
    """Return the scores of the network as a fully convolutional one, averaged over all positions.

    Args:
      model: a network with classes.
      variables: its variables.
      images: (N, H, W, C), normalized, of any size whose last map is at least `pool_size` in both directions.

    Returns:
      (N, num_classes) scores, before the softmax.

    Raises:
      UserError: if the images are too small, or the network takes maxima in the pool before its head.
    """
    if model.head_pool != "average":
        raise UserError(
            f"the network's head_pool is {model.head_pool!r}; expected 'average': dense evaluation averages over "
            "positions; use the protocol center_crop or multi_crop"
        )
    x = model.apply(variables, images, last_layer=model.stages[-1][-1].name)
    assert isinstance(x, jax.Array)
    size = model.pool_size
    if min(x.shape[1:3]) < size:
        smallest = size * model.smallest_image()
        raise UserError(f"images have shape {images.shape}; expected H and W of at least {smallest}")
    for layer in model.head:
        if layer.kind == "relu":
            x = jax.nn.relu(x)
        elif layer.kind == "dense":
            parameters = variables["params"][layer.name]
            window = (layer.kernel_size, layer.kernel_size)
            kernel = parameters["kernel"].astype(x.dtype).reshape(*window, x.shape[-1], -1)
            precision = of_network(model.precision, model.dtype)
            dimensions = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "VALID", dimension_numbers=dimensions, precision=precision
            )
            x += parameters["bias"].astype(x.dtype)
    return x.mean((1, 2))


def dense_posteriors(
    model: VGG,
    variables: Mapping[str, Any],
    images: Float[Array | np.ndarray, "n h w c"],
    outputs: str = "softmax",
) -> Float[Array, "n classes"]:
    """Return the posteriors of dense evaluation, averaged over each image and its horizontal flip.

    Args:
      model: a network with classes.
      variables: its variables.
      images: as for `dense_scores`.
      outputs: what the scores mean, as for `center_posteriors`.

    Returns:
      (N, num_classes) probabilities or numbers.

    Raises:
      UserError: if the images are too small.
    """
    both = [read_outputs(dense_scores(model, variables, x), outputs) for x in (images, images[:, :, ::-1])]
    return (both[0] + both[1]) / 2


def crop_posteriors(
    model: VGG,
    variables: Mapping[str, Any],
    crops: Float[Array | np.ndarray, "n h w c"],
    outputs: str = "softmax",
) -> Float[Array, " classes"]:
    """Return the mean posteriors of the crops of one image and of their horizontal flips.

    Args:
      model: a network with classes.
      variables: its variables.
      crops: (N, H, W, C), normalized, of the network's input size.
      outputs: what the logits mean, as for `center_posteriors`.

    Returns:
      (num_classes,) probabilities or numbers.
    """
    return center_posteriors(model, variables, jnp.concatenate([crops, crops[:, :, ::-1]]), outputs).mean(0)


def crop_corners(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """Return the (top, left) corners of square crops on a regular 5x5 grid from edge to edge, row by row.

    Args:
      height: the height of the image.
      width: the width of the image.
      size: the side of a crop.
    """
    tops, lefts = ([(i * (length - size) + 2) // (GRID - 1) for i in range(GRID)] for length in (height, width))
    return [(top, left) for top in tops for left in lefts]


def grid_crops(image: Shaped[np.ndarray, "h w c"], size: int) -> Shaped[np.ndarray, "25 size size c"]:
    """Return the 25 crops of an image, on the grid of `crop_corners`.

    Args:
      image: (H, W, C) of any dtype.
      size: the side of a crop.

    Returns:
      (25, size, size, C) of the same dtype.
    """
    corners = crop_corners(image.shape[0], image.shape[1], size)
    return np.stack([image[top : top + size, left : left + size] for top, left in corners])
