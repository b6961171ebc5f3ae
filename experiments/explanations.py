"""Draw a gallery of explanations: eight images of a folder, two of them predicted wrongly.

    python experiments/explanations.py NETWORK FOLDER [--out explanations.png]

FOLDER has a subfolder of images for each class, named as the network's classes. Each row shows an image, Grad-CAM and
integrated gradients of the predicted class. The images are the first ones of different classes in the order of their
paths, first six that are predicted correctly, then two that are not.
"""

import argparse
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from vgg_jax import Network, load
from vgg_jax.cli.explain import default_layer
from vgg_jax.features import explain, picture
from vgg_jax.network import Prediction

RIGHT, WRONG = 6, 2
COLUMNS = 2
SIDE = 160  # pixels of a panel


def true_class(prediction: Prediction) -> str:
    """Return the name of the subfolder that an image is in."""
    return os.path.basename(os.path.dirname(prediction.image))


def choose(predictions: list[Prediction]) -> list[Prediction]:
    """Return RIGHT correct and WRONG wrong predictions, of different classes as far as possible."""
    chosen: list[Prediction] = []
    for correct, count in ((True, RIGHT), (False, WRONG)):
        group = [p for p in predictions if not p.error and (p.names[0] == true_class(p)) == correct]
        seen: dict[str, int] = {}
        order = []
        for prediction in group:
            seen[true_class(prediction)] = seen.get(true_class(prediction), 0) + 1
            order.append(seen[true_class(prediction)])
        ranked = [group[i] for i in np.argsort(order, kind="stable")]
        if len(ranked) < count:
            raise SystemExit(f"found {len(ranked)} images with correct={correct}; expected {count}: add images")
        chosen += ranked[:count]
    return chosen


def row(net: Network, prediction: Prediction) -> PIL.Image.Image:
    """Return the panels of one image."""
    image, label = net.preprocess(prediction.image), jnp.array([prediction.labels[0]])
    assert net.preprocessing is not None  # because the image was preprocessed
    view = net.preprocessing.to_image(image).convert("RGB")
    pixels, layer = np.asarray(view), default_layer(net, image.shape[0])
    heat = jax.jit(functools.partial(explain.grad_cam, net.model, layer=layer))
    shares = jax.jit(functools.partial(explain.integrated_gradients, net.model))
    panels = [
        (view, f"true: {true_class(prediction)}"),
        (picture.heat_overlay(pixels, np.asarray(heat(net.variables, image[None], label)[0])), "Grad-CAM"),
        (
            picture.signed_overlay(pixels, np.asarray(shares(net.variables, image[None], label)[0].sum(-1))),
            "integrated gradients",
        ),
    ]
    mark = "" if prediction.names[0] == true_class(prediction) else "WRONG: "
    title = f"{mark}{prediction.names[0]} ({prediction.probabilities[0]:.0%})"
    return picture.side_by_side(panels, title, SIDE, smooth=False)


def main() -> None:
    """Write the gallery."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="a file or a run's directory")
    parser.add_argument("folder", help="a folder with a subfolder of images for each class")
    parser.add_argument("--out", default="explanations.png", help="(default: %(default)s)")
    options = parser.parse_args()
    net = load(options.network)
    rows = [row(net, prediction) for prediction in choose(net.predict(options.folder, top=1, batch_size=100))]
    width, height = max(r.width for r in rows), max(r.height for r in rows)
    lines = -(-len(rows) // COLUMNS)
    gallery = PIL.Image.new("RGB", (COLUMNS * width, lines * height), "white")
    for i, drawn in enumerate(rows):
        gallery.paste(drawn, (i % COLUMNS * width, i // COLUMNS * height))
    gallery.save(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
