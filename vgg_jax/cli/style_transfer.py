"""Paint one image in the style of another.

    python -m vgg_jax style-transfer CONTENT STYLE OUT [--weights vgg19]

L-BFGS or Adam changes the pixels until their activations at one layer match those of CONTENT, and their Gram matrices
at five layers match those of STYLE. Gatys, Ecker and Bethge, "Image Style Transfer Using Convolutional Neural
Networks", CVPR 2016.
"""

import argparse
import math
import os
from collections.abc import Sequence

import numpy as np
import PIL.Image

from vgg_jax.cli.network_options import add_network_options, load_network
from vgg_jax.cli.paragraphs import Paragraphs
from vgg_jax.data.image_files import read_image
from vgg_jax.errors import UserError, report_mistakes
from vgg_jax.features.style_transfer import OPTIMIZERS, STYLE_LAYERS, style_transfer
from vgg_jax.runtime import configure


def run(options: argparse.Namespace) -> int:
    """Check the arguments, write the picture, and return the exit code."""
    out, size, steps, style_weight = options.out, options.size, options.steps, options.style_weight
    folder, suffix = os.path.dirname(out) or ".", os.path.splitext(out)[1].lower()
    checks = [
        (f"--size is {size}; expected 1 or more", size >= 1),
        (f"--steps is {steps}; expected 1 or more", steps >= 1),
        (f"--style-weight is {style_weight}; expected 0 or more, and finite", 0 <= style_weight < math.inf),
        (f"{out} ends in {suffix!r}; expected an image's suffix, as .png", suffix in PIL.Image.registered_extensions()),
        (f"{folder}, the folder of {out}, does not exist; create it first", os.path.isdir(folder)),
    ]
    if problems := [problem for problem, holds in checks if not holds]:
        raise UserError("\n".join(problems))
    net = load_network(options.weights, options)
    preprocessing = net.checked_preprocessing()
    smallest = net.model.smallest_image(STYLE_LAYERS[-1])
    if size < smallest:
        raise UserError(f"--size is {size}; expected at least {smallest}, which the max pools before "
                        f"{STYLE_LAYERS[-1]} need")  # fmt: skip
    paths = (options.content, options.style)
    content, style = (
        read_image(path, lambda image: preprocessing.pixels(image, size) / np.float32(255))[None] for path in paths
    )
    pixels = style_transfer(
        *(net.model, net.variables, content, style, preprocessing),
        style_weight=style_weight,
        steps=steps,
        optimizer=options.optimizer,
    )[0]
    try:
        PIL.Image.fromarray(_drop_gray_axis((pixels * 255).round().astype(np.uint8))).save(out)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out}: {error}; choose another file") from None
    print(out)
    return 0


def _drop_gray_axis(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="vgg-jax style-transfer", description=__doc__, formatter_class=Paragraphs)
    parser.add_argument("content", help="the image whose content to keep")
    parser.add_argument("style", help="the image whose style to take")
    parser.add_argument("out", help="the picture to write")
    parser.add_argument(
        "--weights",
        default="vgg19",
        help="a pretrained network's name, a file, or a run's directory (default: %(default)s)",
    )
    parser.add_argument("--size", type=int, default=256, help="short side of both images (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="steps of the optimizer (default: %(default)s)")
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="lbfgs", help="lbfgs as in the paper, or adam (default: %(default)s)"
    )
    parser.add_argument(
        "--style-weight",
        type=float,
        default=100.0,
        help="weight of the style; the content's is 1 (default: %(default)s)",
    )
    add_network_options(parser)
    options = parser.parse_args(argv)
    configure()
    return report_mistakes("style-transfer", lambda: run(options), f"lower --size (now {options.size})")
