"""Style transfer: paint one image in the style of another."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vgg_jax.console import Bar
from vgg_jax.features.activations import layer_activations
from vgg_jax.features.gram import gram_matrix
from vgg_jax.model import VGG

CONTENT_LAYER = "conv4_2"
STYLE_LAYERS = ("conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv5_1")


def style_transfer(
    model: VGG,
    variables: Mapping[str, Any],
    content: Float[Array | np.ndarray, "1 h w c"],
    style: Float[Array | np.ndarray, "1 style_h style_w c"],
    style_weight: float = 100.0,
    steps: int = 300,
    learning_rate: float = 0.02,
    average_pool: bool = True,
) -> Float[Array, "1 h w c"]:
    """Return an image with the content of one image and the style of another.

    Both losses are relative squared errors, so the defaults suit any weights: the content loss that of activations, the
    style loss the mean over layers of that of Gram matrices.

    Args:
      model: the network, with any depth and head.
      variables: its variables. Those of the head may be missing.
      content: (1, H, W, C) floats, normalized by the preprocessing of the weights. The optimization starts from it.
      style: (1, H', W', C) likewise.
      style_weight: the weight of the style loss. The weight of the content loss is 1.
      steps: the number of steps of Adam.
      learning_rate: the learning rate of Adam, in units of normalized pixels.
      average_pool: use average pooling in place of max pooling, which the paper found better.

    Returns:
      (1, H, W, C) normalized floats.

    Source:
      Gatys et al. (2016), "Image Style Transfer Using Convolutional Neural Networks".
    """
    import optax  # here, because vgg_jax imports this module and nothing else at prediction needs optax

    layers = (CONTENT_LAYER, *STYLE_LAYERS)
    maps = jax.jit(functools.partial(layer_activations, model, layers=layers, average_pool=average_pool))
    wanted_content = maps(variables, content)[CONTENT_LAYER]
    wanted_style = {name: gram_matrix(x) for name, x in maps(variables, style).items() if name in STYLE_LAYERS}

    def loss(image: jax.Array, variables: Mapping[str, Any]) -> jax.Array:
        found = maps(variables, image)
        styles = [_relative_error(gram_matrix(found[name]), wanted) for name, wanted in wanted_style.items()]
        return _relative_error(found[CONTENT_LAYER], wanted_content) + style_weight * jnp.stack(styles).mean()

    optimizer = optax.adam(learning_rate)

    @jax.jit
    def step(image: jax.Array, state: Any, variables: Mapping[str, Any]) -> tuple[jax.Array, Any, jax.Array]:
        # The variables are an argument because a closure would compile them in as constants.
        value, gradient = jax.value_and_grad(loss)(image, variables)
        updates, state = optimizer.update(gradient, state)
        return image + updates, state, value

    image = jnp.asarray(content)
    state = optimizer.init(image)
    with Bar("style transfer", steps, "steps") as bar:
        for i in range(steps):
            image, state, value = step(image, state, variables)
            bar.fact = f"loss {float(value):.4f}" if i % 10 == 0 else bar.fact
            bar.update()
    return image


def _relative_error(found: jax.Array, wanted: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(found.dtype, jnp.float32)  # sums of float16 overflow above 65,504
    found, wanted = found.astype(dtype), wanted.astype(dtype)
    return jnp.square(found - wanted).sum() / jnp.square(wanted).sum()
