"""Style transfer: paint one image in the style of another."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vgg_jax.console import Bar
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.errors import UserError
from vgg_jax.features.activations import layer_activations
from vgg_jax.features.gram import gram_matrix
from vgg_jax.model import VGG

CONTENT_LAYER = "conv4_2"
STYLE_LAYERS = ("conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv5_1")
OPTIMIZERS = ("lbfgs", "adam")

Objective = Callable[[Any], tuple[jax.Array, jax.Array]]  # from pixels to the loss and its gradient


def style_transfer(
    model: VGG,
    variables: Mapping[str, Any],
    content: Float[Array | np.ndarray, "1 h w c"],
    style: Float[Array | np.ndarray, "1 style_h style_w c"],
    preprocessing: Preprocessing,
    *,
    style_weight: float = 100.0,
    steps: int = 300,
    optimizer: str = "lbfgs",
    learning_rate: float = 0.02,
    average_pool: bool = True,
) -> Float[np.ndarray, "1 h w c"]:
    """Return an image with the content of one image and the style of another.

    The optimizer changes pixels from 0 to 1, whatever images the weights expect; the loss normalizes them. The content
    loss is the relative squared error of conv4_2. The style loss is the mean relative squared error of the Gram
    matrices of conv1_1, conv2_1, conv3_1, conv4_1 and conv5_1. So the defaults suit any weights.

    Args:
      model: the network, with any depth and head.
      variables: its variables. Those of the head may be missing.
      content: (1, H, W, C) pixels from 0 to 1, RGB or gray. The optimization starts from it.
      style: (1, H', W', C) likewise.
      preprocessing: the normalization and the channel order that the weights expect.
      style_weight: the weight of the style loss. The weight of the content loss is 1.
      steps: the number of steps of the optimizer. L-BFGS stops earlier if no step reduces the loss.
      optimizer: lbfgs, as in the paper, or adam, whose steps are cheaper in memory.
      learning_rate: the learning rate of Adam, as a part of the range from black to white. L-BFGS needs none.
      average_pool: use average pooling in place of max pooling, which the paper found better.

    Returns:
      (1, H, W, C) float32 pixels from 0 to 1.

    Raises:
      UserError: if the optimizer is unknown, the pixels are not floats from 0 to 1, or the network lacks a layer.

    Source:
      Gatys et al. (2016), "Image Style Transfer Using Convolutional Neural Networks".
    """
    if optimizer not in OPTIMIZERS:
        raise UserError(f"the optimizer is {optimizer!r}; expected one of {', '.join(OPTIMIZERS)}")
    _check("content", content)
    _check("style", style)
    layers = (CONTENT_LAYER, *STYLE_LAYERS)
    maps = functools.partial(layer_activations, model, layers=layers, average_pool=average_pool)
    seen = jax.jit(lambda variables, pixels: maps(variables, normalize(pixels, preprocessing)))
    wanted_content = seen(variables, content)[CONTENT_LAYER]
    wanted_style = {name: gram_matrix(x) for name, x in seen(variables, style).items() if name in STYLE_LAYERS}

    def loss(pixels: jax.Array, variables: Mapping[str, Any], content: jax.Array, grams: Any) -> jax.Array:
        found = seen(variables, pixels)
        styles = [_relative_error(gram_matrix(found[name]), wanted) for name, wanted in grams.items()]
        return _relative_error(found[CONTENT_LAYER], content) + style_weight * jnp.stack(styles).mean()

    gradient = jax.jit(jax.value_and_grad(loss))
    # The arrays are arguments because a closure would compile them in as constants.
    objective = functools.partial(gradient, variables=variables, content=wanted_content, grams=wanted_style)
    start = np.asarray(content, np.float32)
    return _adam(objective, start, steps, learning_rate) if optimizer == "adam" else _lbfgs(objective, start, steps)


def normalize(
    pixels: Float[Array | np.ndarray, "n h w c"], preprocessing: Preprocessing
) -> Float[Array | np.ndarray, "n h w c"]:
    """Return pixels from 0 to 1, RGB or gray, in the units and the channel order of a network; inside jit and grad."""
    ordered = pixels[..., ::-1] if preprocessing.channel_order == "BGR" else pixels
    return (ordered - np.array(preprocessing.mean, np.float32)) / np.array(preprocessing.std, np.float32)


def _check(name: str, image: Any) -> None:
    """Raise UserError for pixels that are not from 0 to 1."""
    low, high = np.min(image), np.max(image)
    if not (jnp.issubdtype(image.dtype, jnp.floating) and low >= 0 and high <= 1):
        raise UserError(
            f"{name} has values of {image.dtype} from {low:g} to {high:g}; expected floats from 0 to 1: divide the "
            "pixels by 255, and do not normalize them"
        )


def _adam(objective: Objective, pixels: np.ndarray, steps: int, learning_rate: float) -> np.ndarray:
    """Return the pixels after some steps of Adam; each step clips them to 0 to 1."""
    import optax  # here, because vgg_jax imports this module and nothing else at prediction needs optax

    adam = optax.adam(learning_rate)

    @jax.jit
    def step(pixels: jax.Array, state: Any, slope: jax.Array) -> tuple[jax.Array, Any]:
        updates, state = adam.update(slope, state)
        return jnp.clip(pixels + updates, 0, 1), state

    state, moved = adam.init(jnp.asarray(pixels)), jnp.asarray(pixels)
    with Bar("style transfer", steps, "steps") as bar:
        for i in range(steps):
            value, slope = objective(moved)
            moved, state = step(moved, state, slope)
            bar.fact = f"loss {float(value):.4f}" if i % 10 == 0 else bar.fact
            bar.update()
    return np.asarray(moved)


def _lbfgs(objective: Objective, pixels: np.ndarray, steps: int) -> np.ndarray:
    """Return the pixels after some steps of L-BFGS with the bounds 0 and 1."""
    import scipy.optimize  # here, because it takes 0.2 s; JAX depends on SciPy

    with Bar("style transfer", steps, "steps") as bar:

        def evaluate(flat: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope = objective(flat.reshape(pixels.shape).astype(np.float32))
            bar.fact = f"loss {float(value):.4f}"
            return float(value), np.asarray(slope, np.float64).ravel()

        found = scipy.optimize.minimize(
            evaluate,
            pixels.ravel().astype(np.float64),
            jac=True,
            method="L-BFGS-B",
            bounds=scipy.optimize.Bounds(0, 1),
            callback=lambda _: bar.update(),
            options={"maxiter": steps, "maxfun": 20 * steps, "ftol": 0.0, "gtol": 0.0},
        )
    return np.asarray(found.x.reshape(pixels.shape), np.float32)


def _relative_error(found: jax.Array, wanted: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(found.dtype, jnp.float32)  # sums of float16 overflow above 65,504
    found, wanted = found.astype(dtype), wanted.astype(dtype)
    return jnp.square(found - wanted).sum() / jnp.square(wanted).sum()
