"""Activations of named layers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from vgg_jax.errors import UserError
from vgg_jax.model import VGG


def layer_activations(
    model: VGG,
    variables: Mapping[str, Any],
    images: Float[Array | np.ndarray, "n h w c"],
    layers: str | Sequence[str],
    average_pool: bool = False,
) -> dict[str, Float[Array, "n ..."]]:
    """Return the outputs of the named layers, from one pass that stops at the deepest of them.

    Can be used inside `jit` and `grad`.

    Args:
      model: the network.
      variables: its variables. Those of deeper layers may be missing.
      images: (N, H, W, C) floats, normalized by the preprocessing of the weights. H and W are at least
        `model.smallest_image` of the deepest layer.
      layers: names from `model.layer_names`, or one name: conv1_1 is before the ReLU, relu1_1 after it.
      average_pool: use average pooling in place of max pooling, as Gatys et al. (2016) do for style transfer.

    Returns:
      From each name to (N, H', W', C'), or (N, C') for a layer of the head, in the model's dtype. With `conv_head`, the
      head has maps up to relu7.

    Raises:
      UserError: if a name is not a layer of the model, or there is no name; the message lists the layers.
      ValueError: if the images are too small, or not floats with four axes.
    """
    names = model.layer_names
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    unknown = [str(layer) for layer in layers if layer not in names]
    if unknown or not layers:
        raise UserError(f"found no layer {', '.join(unknown) or 'named'}; expected some of {', '.join(names)}")
    deepest = max(layers, key=names.index)
    _, state = model.apply(variables, images, last_layer=deepest, average_pool=average_pool, mutable=["intermediates"])
    return {layer: state["intermediates"]["outputs"][layer] for layer in layers}
