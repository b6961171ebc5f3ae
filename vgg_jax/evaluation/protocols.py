"""The evaluation protocols of the paper's section 4, for images in memory.

Dense evaluation applies the fully connected layers as convolutions to the whole image and averages the class scores
over all positions. Multi-crop evaluation averages the posteriors of a grid of crops. Both average over the image and
its horizontal flip, and over scales. For an image larger than the network's input, dense evaluation differs from the
network's own adaptive pooling.

Dense evaluation takes images of several sizes in one batch: they are padded on the right and at the bottom, and `sizes`
states their true heights and widths. The scores are those of the images without padding.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

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
      (N, num_classes) probabilities in at least float32; for `values`, the numbers themselves.

    Raises:
      ValueError: if the images are too small, or not floats with four axes.
    """
    if not flip:
        return read_outputs(jnp.asarray(model.apply(variables, images)), outputs)
    logits = jnp.asarray(model.apply(variables, _with_flips(images, horizontal_flip(images))))
    return read_outputs(_mean_of_pairs(logits), outputs)


def dense_scores(
    model: VGG,
    variables: Mapping[str, Any],
    images: Float[Array | np.ndarray, "n h w c"],
    sizes: Int[Array | np.ndarray, "n 2"] | None = None,
) -> Float[Array, "n classes"]:
    """Return the scores of the network as a fully convolutional one, averaged over all positions.

    Args:
      model: a network with classes.
      variables: its variables.
      images: (N, H, W, C), normalized, of any size whose last map is at least `pool_size` in both directions.
      sizes: (N, 2), the height and width of each image without its padding. The values of the padding do not matter. By
        default the images have no padding.

    Returns:
      (N, num_classes) scores, before the softmax, in the model's dtype.

    Raises:
      UserError: if the last map is smaller than `pool_size`, or the network takes maxima in the pool before its head.
      ValueError: if H or W is less than `model.smallest_image()`, or the images are not floats with four axes.

    Source:
      Section 3.2 of the paper, which follows Sermanet et al. (2014), "OverFeat".
    """
    x = dense_maps(model, variables, images, sizes, model.layer_names[-1:])[model.layer_names[-1]]
    if sizes is None:
        return x.mean((1, 2))
    windows = map_sizes(model, model.layer_names[-1], jnp.asarray(sizes))
    return jnp.where(inside(x, windows), x, 0).sum((1, 2)) / windows.prod(1, keepdims=True)


def dense_maps(
    model: VGG,
    variables: Mapping[str, Any],
    images: Float[Array | np.ndarray, "n h w c"],
    sizes: Int[Array | np.ndarray, "n 2"] | None,
    layers: Sequence[str],
) -> dict[str, Float[Array, "n h2 w2 c2"]]:
    """Return the maps of named layers of the network as a fully convolutional one.

    Args:
      model: a network.
      variables: its variables. Those of deeper layers may be missing.
      images: as for `dense_scores`.
      sizes: as for `dense_scores`. Values outside the true map of an image, see `map_sizes`, have no meaning.
      layers: names from `model.layer_names`. A layer of the head has one position for each window of `pool_size`.

    Returns:
      From each name to (N, H', W', C') in the model's dtype.

    Raises:
      UserError: if the images are too small for the head, or a layer follows a pool that takes maxima before the head.
      ValueError: if the images are too small for the layers, or not floats with four axes.
      KeyError: if a name is not a layer of the network.
    """
    network = model if sizes is None else zero_padded(model, jnp.asarray(sizes))
    trunk = [layer.name for stage in model.stages for layer in stage]
    in_head = any(layer not in trunk for layer in layers)
    if in_head and model.head_pool != "average":
        raise UserError(
            f"the network's head_pool is {model.head_pool!r}; expected 'average': dense evaluation averages over "
            "positions; use the protocol center_crop or multi_crop"
        )
    deepest = trunk[-1] if in_head else max(layers, key=trunk.index)
    _, state = network.apply(variables, images, last_layer=deepest, mutable=["intermediates"])
    maps = dict(state["intermediates"]["outputs"])
    if in_head:
        if min(maps[deepest].shape[1:3]) < model.pool_size:
            smallest = model.pool_size * model.smallest_image()
            raise UserError(f"images have shape {images.shape}; expected H and W of at least {smallest}")
        maps |= _head_maps(model, variables, maps[deepest])
    return {layer: maps[layer] for layer in layers}


def _head_maps(model: VGG, variables: Mapping[str, Any], x: Float[Array, "n h w c"]) -> dict[str, jax.Array]:
    """Return the maps of the head's layers, applied as convolutions to the last map of the stages."""
    maps = {}
    for layer in model.head:
        if layer.kind == "relu":
            x = jax.nn.relu(x)
        elif layer.kind == "dense":
            if layer.name not in variables["params"]:
                break  # a deeper layer than those that are needed
            parameters = variables["params"][layer.name]
            window = (layer.kernel_size, layer.kernel_size)
            kernel = parameters["kernel"].astype(x.dtype).reshape(*window, x.shape[-1], -1)
            precision = of_network(model.precision, model.dtype)
            dimensions = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "VALID", dimension_numbers=dimensions, precision=precision
            )
            x += parameters["bias"].astype(x.dtype)
        maps[layer.name] = x
    return maps


def map_sizes(model: VGG, layer: str, sizes: Int[Array, "n 2"]) -> Int[Array, "n 2"]:
    """Return the height and width of a layer's map for images of given sizes: a pool drops an odd last row or column.

    Args:
      model: a network.
      layer: the name of a layer. For one of the head, the windows of `pool_size` are counted.
      sizes: (N, 2), the height and width of each image.
    """
    in_head = layer in [other.name for other in model.head]
    return sizes // model.smallest_image(layer) - (model.pool_size - 1 if in_head else 0)


def zero_padded(model: VGG, sizes: Int[Array, "n 2"]) -> VGG:
    """Return the network for padded images: each convolution sees zeros outside the true size of each image.

    So the output inside the true size is that of the image without padding. Only the 3x3 convolutions look across that
    border. A max pool drops an odd last row or column, and the other layers work on each position alone.

    Args:
      model: a network.
      sizes: (N, 2), the height and width of each image without its padding.
    """

    def conv(features: int, kernel_size: tuple[int, int], *, name: str, **options: Any) -> Callable[..., jax.Array]:
        layer = model.layers.conv(features, kernel_size, name=name, **options)
        limits = sizes // model.smallest_image(name)  # smallest_image is the stride of the layer
        return lambda x: layer(jnp.where(inside(x, limits), x, 0))

    return model.clone(layers=dataclasses.replace(model.layers, conv=conv), remat=False)


def inside(x: Float[Array, "n h w c"], sizes: Int[Array, "n 2"]) -> Bool[Array, "n h w 1"]:
    """Return whether each position of maps lies inside the true size of its image."""
    rows, columns = (jnp.arange(length) < sizes[:, i : i + 1] for i, length in enumerate(x.shape[1:3]))
    return (rows[:, :, None] & columns[:, None, :])[..., None]


def horizontal_flip(
    images: Shaped[Array | np.ndarray, "n h w c"], sizes: Int[Array | np.ndarray, "n 2"] | None = None
) -> Shaped[Array | np.ndarray, "n h w c"]:
    """Return the horizontal flip of each image, with its padding on the right again.

    Args:
      images: (N, H, W, C) of any dtype.
      sizes: (N, 2), the height and width of each image without its padding; by default it has none.
    """
    if sizes is None:
        return images[:, :, ::-1]
    columns = (sizes[:, 1:] - 1 - jnp.arange(images.shape[2])) % images.shape[
        2
    ]  # a column left of the first is padding
    return jnp.take_along_axis(jnp.asarray(images), columns[:, None, :, None], 2)


def dense_posteriors(
    model: VGG,
    variables: Mapping[str, Any],
    images: Float[Array | np.ndarray, "n h w c"],
    outputs: str = "softmax",
    sizes: Int[Array | np.ndarray, "n 2"] | None = None,
) -> Float[Array, "n classes"]:
    """Return the posteriors of dense evaluation, averaged over each image and its horizontal flip.

    Args:
      model: a network with classes.
      variables: its variables.
      images: as for `dense_scores`.
      outputs: what the scores mean, as for `center_posteriors`.
      sizes: as for `dense_scores`.

    Returns:
      (N, num_classes) probabilities, or numbers for `values`, in the model's dtype.

    Raises:
      The errors of `dense_scores`.
    """
    both = _with_flips(images, horizontal_flip(images, sizes))
    scores = dense_scores(model, variables, both, None if sizes is None else jnp.repeat(jnp.asarray(sizes), 2, 0))
    return _mean_of_pairs(read_outputs(scores, outputs))


def _with_flips(
    images: Float[Array | np.ndarray, "n h w c"], flips: Float[Array | np.ndarray, "n h w c"]
) -> Float[Array, "{2*images.shape[0]} h w c"]:
    """Return each image followed by its flip: one pass of the network compiles in half the time of two.

    Side by side, so that the two stay on the device of the image if the batch is sharded.
    """
    return jnp.stack([images, flips], 1).reshape(-1, *images.shape[1:])


def _mean_of_pairs(rows: Float[Array, "m classes"]) -> Float[Array, "n classes"]:
    return rows.reshape(-1, 2, rows.shape[1]).mean(1)


def flip_posteriors(
    model: VGG,
    variables: Mapping[str, Any],
    crops: Float[Array | np.ndarray, "n h w c"],
    outputs: str = "softmax",
) -> Float[Array, "n classes"]:
    """Return the posteriors of each crop, averaged over the crop and its horizontal flip.

    Args:
      model: a network with classes.
      variables: its variables.
      crops: (N, H, W, C), normalized, of the network's input size.
      outputs: what the logits mean, as for `center_posteriors`.

    Returns:
      (N, num_classes) probabilities or numbers.
    """
    both = _with_flips(crops, horizontal_flip(crops))
    return _mean_of_pairs(center_posteriors(model, variables, both, outputs))


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
      (num_classes,) probabilities, or numbers for `values`, in at least float32.

    Raises:
      ValueError: if the crops are too small, or not floats with four axes.

    Source:
      Section 3.2 of the paper: a 5x5 grid of crops and their flips.
    """
    return flip_posteriors(model, variables, crops, outputs).mean(0)


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
    """Return the 25 crops of an image, on a regular 5x5 grid from edge to edge, row by row.

    Args:
      image: (H, W, C) of any dtype.
      size: the side of a crop in pixels, at most H and W.

    Returns:
      (25, size, size, C) of the same dtype.
    """
    corners = crop_corners(image.shape[0], image.shape[1], size)
    return np.stack([image[top : top + size, left : left + size] for top, left in corners])
