"""What people use a trained VGG's features for: named activations, Gram matrices, perceptual distance."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vgg_jax.model import VGG


def features(
    model: VGG, variables: Mapping[str, Any], images: jax.Array, layers: Sequence[str], average_pool: bool = False
) -> dict[str, jax.Array]:
    """The outputs of the named layers, by one pass that stops at the deepest of them. For use within `jit` and `grad`.

    Args:
      model: the network.
      variables: its variables; those of deeper layers may be missing.
      images: (N, H, W, C) floats, normalised as the weights want them.
      layers: names of `model.layer_names`: conv1_1 is before the ReLU, relu1_1 after it.
      average_pool: average where the network takes maxima, as Gatys et al. (2016) do for style transfer.

    Returns:
      From each name to (N, H', W', C'), or (N, C') of a fully connected layer, in the model's dtype.

    Raises:
      ValueError: where a name is no layer of the model; it lists those that are.
    """
    names = model.layer_names
    unknown = [layer for layer in layers if layer not in names]
    if unknown or not layers:
        raise ValueError(f"found no layer {', '.join(unknown) or 'named'}; expected some of {', '.join(names)}")
    deepest = max(layers, key=names.index)
    _, state = model.apply(variables, images, last_layer=deepest, average_pool=average_pool, mutable=["intermediates"])
    return {layer: state["intermediates"]["outputs"][layer] for layer in layers}


def gram_matrix(maps: jax.Array) -> jax.Array:
    """The channels' inner products over all positions: (N, H, W, C) to (N, C, C), divided by H * W * C.

    As in Johnson et al. (2016), section 3.2.
    """
    _, height, width, channels = maps.shape
    products = jnp.einsum("nhwc,nhwd->ncd", maps, maps, precision=jax.lax.Precision.HIGHEST)
    return products / (height * width * channels)


def perceptual_distance(
    model: VGG, variables: Mapping[str, Any], images: jax.Array, others: jax.Array, layers: Mapping[str, float]
) -> jax.Array:
    """How far apart two batches look: for each pair, the weighted mean squared differences of activations, summed.

    The feature reconstruction loss of Johnson et al. (2016), section 3.2; with one layer of weight 1 exactly that.

    Args:
      model: the network.
      variables: its variables.
      images: (N, H, W, C) floats, normalised as the weights want them.
      others: the same shape.
      layers: from a layer's name to its weight, as {"relu1_2": 1.0, "relu2_2": 0.5}.

    Returns:
      (N,) distances of at least 0.
    """
    ours, theirs = (features(model, variables, x, list(layers)) for x in (images, others))

    def distance(layer: str) -> jax.Array:
        difference = ours[layer] - theirs[layer]
        return jnp.square(difference).mean(tuple(range(1, difference.ndim)))

    return sum((weight * distance(layer) for layer, weight in layers.items()), start=jnp.zeros(()))
