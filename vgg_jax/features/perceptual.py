"""The perceptual distance between two batches of images."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vgg_jax.errors import UserError
from vgg_jax.features.activations import layer_activations
from vgg_jax.model import VGG


def perceptual_distance(
    model: VGG,
    variables: Mapping[str, Any],
    images: Float[Array | np.ndarray, "n h w c"],
    others: Float[Array | np.ndarray, "n h w c"],
    layers: Mapping[str, float],
) -> Float[Array, " n"]:
    """Return, for each pair of images, the weighted sum over layers of the mean squared difference of activations.

    With one layer of weight 1, this is the feature reconstruction loss of the source.

    Args:
      model: the network.
      variables: its variables. Those of deeper layers may be missing.
      images: (N, H, W, C) floats, normalized by the preprocessing of the weights.
      others: (N, H, W, C) likewise.
      layers: from the name of a layer to its weight, for example {"relu1_2": 1.0, "relu2_2": 0.5}.

    Returns:
      (N,), each at least 0 if the weights are, in at least float32: the squares are summed in it, whatever the model's
      dtype is.

    Raises:
      UserError: if a name is not a layer of the model, there is no name, or `layers` has no weights.
      ValueError: if the images are too small, or not floats with four axes.

    Source:
      Johnson et al. (2016), section 3.2.
    """
    if not isinstance(layers, Mapping):
        raise UserError(
            f'layers is a {type(layers).__name__}; expected a dict from names to weights, such as {{"relu2_2": 1.0}}'
        )
    ours, theirs = (layer_activations(model, variables, x, list(layers)) for x in (images, others))

    def distance(layer: str) -> jax.Array:
        dtype = jnp.promote_types(ours[layer].dtype, jnp.float32)
        difference = ours[layer].astype(dtype) - theirs[layer].astype(dtype)
        return jnp.square(difference).mean(tuple(range(1, difference.ndim)))

    return sum((weight * distance(layer) for layer, weight in layers.items()), start=jnp.zeros(()))
