"""Paints one image in the style of another: python -m vgg_jax.style_transfer CONTENT STYLE OUT [--weights vgg19]

Gatys, Ecker and Bethge, "Image Style Transfer Using Convolutional Neural Networks", CVPR 2016: the pixels are moved by
Adam until their activations at one layer are those of CONTENT, and their Gram matrices at five layers those of STYLE.
"""

import argparse
import functools
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
from tqdm import tqdm

from vgg_jax.errors import UserError, report_mistakes
from vgg_jax.model import VGG
from vgg_jax.perceptual import features, gram_matrix
from vgg_jax.preprocess import read_image
from vgg_jax.pretrained import load_for_images

CONTENT_LAYER = "conv4_2"
STYLE_LAYERS = ("conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv5_1")


def style_transfer(
    model: VGG,
    variables: Mapping[str, Any],
    content: jax.Array,
    style: jax.Array,
    style_weight: float = 100.0,
    steps: int = 300,
    learning_rate: float = 0.02,
    average_pool: bool = True,
) -> jax.Array:
    """The image that has the content of one image and the style of another.

    Both losses are relative, so that any weights will do: the squared distance of the activations (of the Gram
    matrices, as a mean over the layers) over the squared norm of those wanted.

    Args:
      model: the network; of any depth and head.
      variables: its variables; those of the head may be missing.
      content: (1, H, W, C) floats, normalised as the weights want them; the start too.
      style: (1, H', W', C) likewise.
      style_weight: how much style counts beside content, which counts 1.
      steps: of Adam.
      learning_rate: of Adam, in units of normalised pixels.
      average_pool: average where the network takes maxima, as the paper found better.

    Returns:
      (1, H, W, C) normalised floats.
    """
    layers = (CONTENT_LAYER, *STYLE_LAYERS)
    maps = jax.jit(functools.partial(features, model, layers=layers, average_pool=average_pool))
    wanted_content = maps(variables, content)[CONTENT_LAYER]
    wanted_style = {name: gram_matrix(x) for name, x in maps(variables, style).items() if name in STYLE_LAYERS}

    def relative(found: jax.Array, wanted: jax.Array) -> jax.Array:
        return jnp.square(found - wanted).sum() / jnp.square(wanted).sum()

    def loss(image: jax.Array, variables: Mapping[str, Any]) -> jax.Array:
        found = maps(variables, image)
        styles = [relative(gram_matrix(found[name]), wanted) for name, wanted in wanted_style.items()]
        return relative(found[CONTENT_LAYER], wanted_content) + style_weight * jnp.stack(styles).mean()

    optimizer = optax.adam(learning_rate)

    @jax.jit
    def step(image: jax.Array, state: Any, variables: Mapping[str, Any]) -> tuple[jax.Array, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(image, variables)  # as constants they would be compiled in
        updates, state = optimizer.update(gradient, state)
        return image + updates, state, value

    image, state = content, optimizer.init(content)
    progress = tqdm(range(steps), desc="style transfer", unit=" steps", disable=None)
    for i in progress:
        image, state, value = step(image, state, variables)
        if i % 10 == 0:
            progress.set_postfix(loss=f"{float(value):.4f}")
    return image


def run(content: str, style: str, out: str, weights: str, size: int, steps: int, style_weight: float) -> int:
    """The command; returns its exit code."""
    folder, suffix = os.path.dirname(out) or ".", os.path.splitext(out)[1].lower()
    checks = [
        (f"--size is {size}; expected at least 32 pixels, which five max pools need", size >= 32),
        (f"--steps is {steps}; expected 1 or more", steps >= 1),
        (f"--style-weight is {style_weight}; expected 0 or more, and finite", 0 <= style_weight < math.inf),
        (f"{out} ends in {suffix!r}; expected an image's suffix, as .png", suffix in PIL.Image.registered_extensions()),
        (f"{folder}, where {out} should go, is no folder; make it first", os.path.isdir(folder)),
    ]
    if problems := [problem for problem, holds in checks if not holds]:
        raise UserError("\n".join(problems))
    model, variables, prepare = load_for_images(weights)
    images = [
        jnp.asarray(read_image(path, lambda image: prepare.uncropped(image, size)))[None] for path in (content, style)
    ]
    image = style_transfer(model, variables, images[0], images[1], style_weight, steps)
    try:
        prepare.to_image(np.asarray(image[0])).save(out)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out}: {error}") from None
    print(out)
    return 0


def main() -> int:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vgg_jax.style_transfer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in ("content", "style", "out"):
        parser.add_argument(name)
    parser.add_argument("--weights", default="vgg19", help="a name of load_pretrained, a file, or a run's directory")
    parser.add_argument("--size", type=int, default=256, help="of the short sides, in pixels; by default 256")
    parser.add_argument("--steps", type=int, default=300, help="of Adam; by default 300")
    parser.add_argument("--style-weight", type=float, default=100.0, help="beside the content's 1; by default 100")
    return report_mistakes("style_transfer", lambda: run(**vars(parser.parse_args())))


if __name__ == "__main__":
    sys.exit(main())
