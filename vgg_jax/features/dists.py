"""DISTS, a distance of images that compares structure and texture, on the trunk of VGG-16.

Ding et al. (2020), "Image Quality Assessment: Unifying Structure and Texture Similarity". The values are those of the
authors' package `dists-pytorch`.
"""

import dataclasses
import functools
import importlib.resources
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array, Float, Shaped

from vgg_jax.data.preprocessing import IMAGENET
from vgg_jax.errors import UserError
from vgg_jax.features.activations import layer_activations
from vgg_jax.features.input_range import Range, rescale
from vgg_jax.features.lpips import LAYERS, check_trunk
from vgg_jax.model import VGG

C1 = C2 = 1e-6  # keep the quotients of means and of variances finite
WINDOW = np.outer((0.25, 0.5, 0.25), (0.25, 0.5, 0.25))  # Hanning window of the L2 pool


def dists(
    model: VGG,
    variables: Mapping[str, Any],
    images: Shaped[Array | np.ndarray, "*batch h w 3"],
    others: Float[Array | np.ndarray, "*others_batch others_h others_w 3"],
    *,
    input_range: Range,
    check_range: bool = False,
) -> Float[Array, "*batch"]:
    """Return the DISTS distance of each pair of images: 0 for equal images, in general below 1.

    Can be used inside `jit`, `grad` and `vmap`.

    Args:
      model: VGG-16 without batch norm; the head may be missing. `dtype` is the dtype of its activations.
      variables: its variables: torchvision's for ImageNet, as in `vgg_jax.load("vgg16", features_only=True)`.
      images: (..., H, W, 3) RGB, not normalized, H and W at least 16. The authors resize the short side to 256 pixels
        first.
      others: the same shape.
      input_range: the values of black and of white, such as (0, 1) or (0, 255).
      check_range: raise an error if a value lies outside `input_range`; not inside `jit`.

    Returns:
      (...,) distances, in at least float32.

    Raises:
      UserError: if the network is not VGG-16's convolutional part, the shapes differ, the images are not floats,
        `input_range` does not rise, or `check_range` finds a value outside it.
      ValueError: if the images are smaller than 16 pixels.

    Source:
      Ding et al. (2020), "Image Quality Assessment: Unifying Structure and Texture Similarity"; the weights are those
      of the authors' package `dists-pytorch`.
    """
    if images.shape != others.shape:
        raise UserError(f"the others have shape {others.shape}; expected {images.shape}, as the images")
    check_trunk(model, "DISTS")
    trunk = model.clone(layers=dataclasses.replace(model.layers, pool=l2_pool))

    def maps(batch: Any) -> list[jax.Array]:
        scaled = rescale(batch, input_range, (0.0, 1.0), model.dtype, check_range)
        scaled = scaled.reshape(-1, *scaled.shape[-3:])
        # The package holds them in float32, also for float64 images.
        mean, std = (
            jnp.asarray(np.array(values, np.float32), scaled.dtype) for values in (IMAGENET.mean, IMAGENET.std)
        )
        activations = layer_activations(trunk, variables, (scaled - mean) / std, LAYERS)
        return [scaled, *(x.astype(scaled.dtype) for x in activations.values())]

    parts = zip(maps(images), maps(others), _weights(), strict=True)
    similarity = sum((_similarity(x, y, alpha, beta) for x, y, (alpha, beta) in parts), start=jnp.zeros(()))
    return (1 - similarity).reshape(images.shape[:-3])


def l2_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """Return the root of the windowed mean of squares, at every other position: (N, ceil(H / 2), ceil(W / 2), C)."""
    channels = x.shape[-1]
    kernel = jnp.broadcast_to(jnp.asarray(WINDOW, x.dtype)[:, :, None, None], (3, 3, 1, channels))
    means = jax.lax.conv_general_dilated(
        jnp.square(x), kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels, precision="highest",
    )  # fmt: skip
    return jnp.sqrt(means + 1e-12)


def _similarity(x: jax.Array, y: jax.Array, alpha: np.ndarray, beta: np.ndarray) -> jax.Array:
    """Return the weighted similarity of textures (means) and of structures (covariances) over channels, (N,)."""
    x_mean, y_mean = x.mean((1, 2)), y.mean((1, 2))
    texture = (2 * x_mean * y_mean + C1) / (x_mean**2 + y_mean**2 + C1)
    x_variance, y_variance = (jnp.square(m - m.mean((1, 2), keepdims=True)).mean((1, 2)) for m in (x, y))
    covariance = (x * y).mean((1, 2)) - x_mean * y_mean
    structure = (2 * covariance + C2) / (x_variance + y_variance + C2)
    return (jnp.asarray(alpha, x.dtype) * texture + jnp.asarray(beta, x.dtype) * structure).sum(-1)


@functools.cache
def _weights() -> list[tuple[np.ndarray, np.ndarray]]:
    """Return alpha and beta, (C,), of the image and of each of LAYERS; together they sum to 1."""
    content = importlib.resources.files("vgg_jax.features").joinpath("dists.safetensors").read_bytes()
    arrays = {name: array.astype(np.float64) for name, array in safetensors.numpy.load(content).items()}
    total = arrays["alpha"].sum() + arrays["beta"].sum()
    ends = np.cumsum((3, 64, 128, 256, 512))
    alphas, betas = (np.split(arrays[name] / total, ends) for name in ("alpha", "beta"))
    return list(zip(alphas, betas, strict=True))
