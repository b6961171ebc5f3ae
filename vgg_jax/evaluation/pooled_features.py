"""The features of a batch of images: named activations, pooled over positions and the horizontal flip."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.errors import UserError
from vgg_jax.evaluation.posteriors import normalized
from vgg_jax.evaluation.protocols import dense_maps, horizontal_flip, inside, map_sizes
from vgg_jax.features.activations import layer_activations
from vgg_jax.model import VGG

POOLS = ("average", "max", "none")
COMBINATIONS = ("average", "stack")


@dataclasses.dataclass(frozen=True)
class FeatureOptions:
    """Choices of the features of an image.

    Raises:
      UserError: if they contradict each other.
    """

    layers: tuple[str, ...]  # names from model.layer_names
    pool: str = "average"  # of maps over positions: average, max, or none to keep the map
    scales: tuple[int, ...] = ()  # short sides of whole images; (): the test view of the preprocessing
    combine: str = "average"  # of the features at several scales: average, or stack one after the other
    flip: bool = False  # average over the image and its horizontal flip
    normalize: bool = False  # divide the features of each layer by their L2 norm

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise UserError(f"pool is {self.pool!r}; expected one of {', '.join(POOLS)}")
        if self.combine not in COMBINATIONS:
            raise UserError(f"combine is {self.combine!r}; expected one of {', '.join(COMBINATIONS)}")
        if self.pool == "none" and (self.scales or self.flip or self.normalize):
            raise UserError(
                "pool is 'none', which keeps maps; expected average or max to combine scales, flips or norms: choose a "
                "pool, or leave out the scales, flip and normalize"
            )
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise UserError(f"the layers are {self.layers}; expected one or several different names")
        if any(scale < 1 for scale in self.scales) or len(set(self.scales)) < len(self.scales):
            raise UserError(f"the scales are {self.scales}; expected different positive numbers of pixels")
        if self.combine == "stack" and len(self.scales) < 2:
            raise UserError(f"combine is 'stack' with the scales {self.scales}; expected two or more scales")


def check_options(model: VGG, preprocessing: Preprocessing, options: FeatureOptions) -> None:
    """Raise UserError if a network cannot compute the features."""
    names = model.layer_names
    unknown = [layer for layer in options.layers if layer not in names]
    if unknown:
        raise UserError(f"found no layer {', '.join(unknown)}; expected some of {', '.join(names)}")
    trunk = [layer.name for stage in model.stages for layer in stage]
    deepest = max(options.layers, key=names.index)
    in_head = deepest not in trunk
    if options.scales and in_head and model.head_pool != "average":
        raise UserError(
            f"head_pool is {model.head_pool!r}; expected 'average' for {deepest} at scales: omit the scales"
        )
    smallest = model.smallest_image(deepest) * (model.pool_size if in_head and options.scales else 1)
    side = min(options.scales, default=preprocessing.crop)
    if side < smallest:
        what = "the smallest scale" if options.scales else "the crop of the preprocessing"
        raise UserError(f"{what} is {side}; expected {smallest} or more pixels for {deepest}: enlarge it")


def image_features(
    model: VGG,
    preprocessing: Preprocessing,
    options: FeatureOptions,
    padded: bool,
    variables: Mapping[str, Any],
    images: UInt8[Array, "n h w c"],
    sizes: Int[Array, "n 2"],
) -> dict[str, Float[Array, "n ..."]]:
    """Return the features of a batch at one scale, before norms.

    Args:
      model: the network.
      preprocessing: the normalization of the images.
      options: the choices.
      padded: whether the images have padding.
      variables: the variables.
      images: (N, H, W, C) uint8.
      sizes: (N, 2), the height and width of each image without its padding.

    Returns:
      From each layer to (N, C') float32, or (N, H', W', C') if the pool is none.
    """
    true_sizes = sizes if padded else None
    if options.flip:
        flips = horizontal_flip(images, true_sizes)
        images = jnp.stack([images, flips], 1).reshape(-1, *images.shape[1:])
        true_sizes = None if true_sizes is None else jnp.repeat(true_sizes, 2, 0)
    x = normalized(images, preprocessing)
    if options.scales:
        found = dense_maps(model, variables, x, true_sizes, options.layers)
    else:
        found = layer_activations(model, variables, x, options.layers)
    result = {}
    for layer, values in found.items():
        values = values.astype(jnp.float32)
        if values.ndim == 4 and options.pool != "none":
            # Without padding, every position counts.
            valid = None if true_sizes is None else inside(values, map_sizes(model, layer, true_sizes))
            values = _pooled(values, options.pool, valid)
        if options.flip:
            values = values.reshape(-1, 2, values.shape[1]).mean(1)
        result[layer] = values
    return result


def _pooled(maps: Float[Array, "n h w c"], pool: str, valid: Bool[Array, "n h w 1"] | None) -> Float[Array, "n c"]:
    """Return the average or the maximum over the positions that are valid; over all if `valid` is None."""
    if pool == "max":
        return (maps if valid is None else jnp.where(valid, maps, -jnp.inf)).max((1, 2))
    if valid is None:
        return maps.mean((1, 2))
    return jnp.where(valid, maps, 0).sum((1, 2)) / valid.sum((1, 2))
