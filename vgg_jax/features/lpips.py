"""LPIPS, the learned perceptual distance of images, on the trunk of VGG-16.

Zhang et al. (2018), "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric". The values are those of
the authors' package `lpips` with net="vgg". Their AlexNet and SqueezeNet trunks are not part of vgg_jax.
"""

import functools
import importlib.resources
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array, Float, Shaped

from vgg_jax.errors import UserError
from vgg_jax.features.activations import layer_activations
from vgg_jax.features.input_range import Range, rescale
from vgg_jax.model import VGG

LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")
VERSIONS = ("0.1", "0.0")  # 0.0 does not shift and scale the images
# They apply to images in [-1, 1]. The package holds them in float32, also for float64 images.
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
EPSILON = 1e-10


def lpips(
    model: VGG,
    variables: Mapping[str, Any],
    images: Shaped[Array | np.ndarray, "*batch h w 3"],
    others: Float[Array | np.ndarray, "*others_batch others_h others_w 3"] | Mapping[str, Array],
    *,
    input_range: Range,
    version: str = "0.1",
    spatial: bool = False,
    remat: bool = False,
    check_range: bool = False,
) -> Float[Array, "*distances"]:
    """Return the LPIPS distance of each pair of images.

    Can be used inside `jit`, `grad` and `vmap`. Gradients are finite everywhere, also where an activation is zero.

    Args:
      model: VGG-16 without batch norm; the head may be missing. `dtype` is the dtype of its activations: float32,
        float64 or bfloat16. Distances are computed in at least float32.
      variables: its variables: torchvision's for ImageNet, as in `vgg_jax.load("vgg16", features_only=True)`.
      images: (..., H, W, 3) RGB, not normalized, H and W at least 16.
      others: the same shape, or the result of `lpips_features` for such images.
      input_range: the values of black and of white, such as (-1, 1), (0, 1) or (0, 255).
      version: 0.1 or 0.0, the version of the heads.
      spatial: return a map of distances instead of their mean.
      remat: recompute the activations of each stage in the backward pass to save memory.
      check_range: raise an error if a value lies outside `input_range`; not inside `jit`.

    Returns:
      (...,) distances, each at least 0; with `spatial`, (..., H, W). In at least float32.

    Raises:
      UserError: if the network is not VGG-16's convolutional part, the version is unknown, the shapes differ, the
        images are not floats, `input_range` does not rise, or `check_range` finds a value outside it.
      ValueError: if the images are smaller than 16 pixels.

    Source:
      Zhang et al. (2018), "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"; the heads are those
      of the authors' package `lpips` with net="vgg".
    """
    options: dict[str, Any] = dict(input_range=input_range, version=version, remat=remat, check_range=check_range)
    ours = lpips_features(model, variables, images, **options)
    theirs = others if isinstance(others, Mapping) else lpips_features(model, variables, others, **options)
    if differing := [name for name in LAYERS if name not in theirs or theirs[name].shape != ours[name].shape]:
        found = theirs[differing[0]].shape if differing[0] in theirs else "missing"
        raise UserError(
            f"{differing[0]} of the others is {found}; expected {ours[differing[0]].shape}, as that of the images"
        )
    height, width = images.shape[-3:-1]
    distance = _layer_distance if not remat else jax.checkpoint(_layer_distance)

    def part(name: str) -> jax.Array:
        map_of_layer = distance(ours[name], theirs[name], jnp.asarray(_heads(version)[name]))
        if not spatial:
            return map_of_layer.mean((-2, -1))
        resized: jax.Array = jax.image.resize(map_of_layer, (*map_of_layer.shape[:-2], height, width), "bilinear")
        return resized

    return sum((part(name) for name in LAYERS[1:]), start=part(LAYERS[0]))


def lpips_features(
    model: VGG,
    variables: Mapping[str, Any],
    images: Shaped[Array | np.ndarray, "*batch h w 3"],
    *,
    input_range: Range,
    version: str = "0.1",
    remat: bool = False,
    check_range: bool = False,
) -> dict[str, Float[Array, "*batch h2 w2 c"]]:
    """Return what `lpips` needs of images: their activations. Compute them once for targets that do not change.

    Args:
      model: as for `lpips`.
      variables: its variables.
      images: (..., H, W, 3) RGB, not normalized, H and W at least 16.
      input_range: the values of black and of white.
      version: 0.1 or 0.0, the version of the heads.
      remat: recompute the activations of each stage in the backward pass to save memory.
      check_range: raise an error if a value lies outside `input_range`; not inside `jit`.

    Returns:
      From relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 to (..., H', W', C) activations in the model's dtype.

    Raises:
      The errors of `lpips`.
    """
    if version not in VERSIONS:
        raise UserError(f"version is {version!r}; expected {' or '.join(VERSIONS)}")
    check_trunk(model, "LPIPS")
    scaled = rescale(images, input_range, (-1.0, 1.0), model.dtype, check_range)
    if version != "0.0":
        scaled = (scaled - jnp.asarray(SHIFT, scaled.dtype)) / jnp.asarray(SCALE, scaled.dtype)
    batch = scaled.shape[:-3]
    maps = layer_activations(model.clone(remat=remat), variables, scaled.reshape(-1, *scaled.shape[-3:]), LAYERS)
    return {name: x.reshape(*batch, *x.shape[1:]) for name, x in maps.items()}


def check_trunk(model: VGG, metric: str) -> None:
    """Raise UserError if a network's convolutional part is not that of VGG-16 without batch norm."""
    if (model.column, model.batch_norm) != ("D", False) or not set(model.pool_after) >= {1, 2, 3, 4}:
        norm = " with batch norm" if model.batch_norm else ""
        raise UserError(
            f"found column {model.column}{norm} with pools after stages {model.pool_after}; {metric} is defined on "
            'VGG-16 without batch norm: use vgg_jax.load("vgg16", features_only=True)'
        )


def _layer_distance(ours: jax.Array, theirs: jax.Array, head: jax.Array) -> jax.Array:
    """Return the weighted squared differences of unit-normalized activations, (..., H, W), in at least float32."""
    difference = _unit(ours) - _unit(theirs)
    return jnp.einsum("...c,c->...", jnp.square(difference), head.astype(difference.dtype), precision="highest")


def _unit(maps: jax.Array) -> jax.Array:
    """Return activations divided by their norm over the channels; the gradient of a zero vector is zero."""
    maps = maps.astype(jnp.promote_types(maps.dtype, jnp.float32))
    squares = jnp.square(maps).sum(-1, keepdims=True)
    # The derivative of sqrt is infinite at 0: the inner `where` keeps it out of the gradient.
    norm = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
    return maps / (norm + EPSILON)


@functools.cache
def _heads(version: str) -> dict[str, np.ndarray]:
    """Return the weights of the heads, (C,) for each of LAYERS."""
    content = importlib.resources.files("vgg_jax.features").joinpath("lpips.safetensors").read_bytes()
    arrays = safetensors.numpy.load(content)
    return {name: arrays[f"{version}/{name}"] for name in LAYERS}
