"""Show which parts of an image speak for a class.

    python -m vgg_jax explain IMAGE --out PICTURE [--weights vgg16] [--class NAME] [--method grad-cam] [--layer relu5_3]

Writes a picture: the image as the network sees it, and beside it the explanation. The methods:

    grad-cam    the places of a layer's map that raise the class's logit (Selvaraju et al., 2017)
    guided      the edges and textures that the network responds to: guided backpropagation (Springenberg et al., 2015)
    integrated  how much each pixel adds to the logit: integrated gradients (Sundararajan et al., 2017)
    occlusion   how much the logit falls if a window is covered (Zeiler and Fergus, 2014)

For integrated and occlusion, red speaks for the class and blue against it.
"""

import argparse
import difflib
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from vgg_jax.cli.network_options import add_network_options, load_network
from vgg_jax.cli.paragraphs import Paragraphs
from vgg_jax.data.listing import normal
from vgg_jax.errors import UserError, report_mistakes
from vgg_jax.evaluation.protocols import read_outputs
from vgg_jax.features import explain, picture
from vgg_jax.model import PLAIN
from vgg_jax.network import Network
from vgg_jax.runtime import configure

CAPTIONS = {
    "grad-cam": "Grad-CAM",
    "guided": "guided backpropagation",
    "integrated": "integrated gradients",
    "occlusion": "occlusion",
}
SMALLEST_MAP = 7  # positions a side of the map that --layer defaults to


def run(options: argparse.Namespace) -> int:
    """Check the arguments, write the picture, and return the exit code."""
    out, folder = options.out, os.path.dirname(options.out) or "."
    suffix = os.path.splitext(out)[1].lower()
    checks = [
        (f"{options.image} is not a file; expected an image", os.path.isfile(options.image)),
        (f"{out} ends in {suffix!r}; expected an image's suffix, as .png", suffix in PIL.Image.registered_extensions()),
        (f"{folder}, the folder of {out}, does not exist; create it first", os.path.isdir(folder)),
        (f"--layer is {options.layer}; expected --method grad-cam with it, not {options.method}: leave one out",
         options.layer is None or options.method == "grad-cam"),
    ]  # fmt: skip
    if problems := [problem for problem, holds in checks if not holds]:
        raise UserError("\n".join(problems))
    net = load_network(options.weights, options)
    net.check_has_classes()
    label = None if options.name is None else find_label(net, options.name)
    image = net.preprocess(options.image)
    layer = options.layer or default_layer(net, image.shape[0])
    function = explanation(net, options.method, layer, image.shape[0])
    logits = np.asarray(jax.jit(net.model.clone(layers=PLAIN).apply)(net.variables, image[None]))
    if label is None and net.outputs == "values" and logits.shape[1] > 1:
        raise UserError(f"the outputs of {options.weights} are values; expected the output to explain: pass --class")
    label = int(logits[0].argmax()) if label is None else label
    values = np.asarray(jax.jit(function)(net.variables, image[None], jnp.array([label]))[0])
    if options.method == "grad-cam" and not values.any():
        raise UserError(
            f"{layer} has no place that speaks for class {class_name(net, label)}; expected one: choose another "
            "--layer or --method"
        )
    caption = CAPTIONS[options.method] + (f" of {layer}" if options.method == "grad-cam" else "")
    draw(net, image, logits, label, options.method, values, caption).save(out)
    print(out)
    return 0


def default_layer(net: Network, side: int) -> str:
    """Return the last ReLU whose map has at least SMALLEST_MAP positions a side, or the first ReLU without one.

    The last ReLU of all is the source's choice, but it has 2x2 positions for an image of CIFAR-10.
    """
    geometry = net.model.layer_geometry
    names = [layer.name for stage in net.model.stages for layer in stage if layer.kind == "relu"]
    large = [name for name in names if side // geometry[name].stride >= SMALLEST_MAP]
    return (large or names)[-1 if large else 0]


def explanation(net: Network, method: str, layer: str, side: int) -> Any:
    """Return the function of (variables, images, labels) of a method.

    Raises:
      UserError: if Grad-CAM's layer is unknown or has no map.
    """
    model = net.model.clone(layers=PLAIN)
    match method:
        case "grad-cam":
            maps = [stage_layer.name for stage in model.stages for stage_layer in stage]
            if layer not in maps:
                raise UserError(f"--layer is {layer}; expected one of {', '.join(maps)}")
            return functools.partial(explain.grad_cam, model, layer=layer)
        case "guided":
            return functools.partial(explain.guided_backpropagation, model)
        case "integrated":
            return functools.partial(explain.integrated_gradients, model, batch_size=10)
        case _:
            window = max(1, side // 7)
            return functools.partial(explain.occlusion, model, window=window, batch_size=10)


def find_label(net: Network, name: str) -> int:
    """Return the label of a class, given by its name or its number.

    Raises:
      UserError: if there is no such class, or several have the name.
    """
    count = net.model.num_classes or 0
    if name.isdecimal() and name not in (net.classes or ()):
        if int(name) < count:
            return int(name)
        raise UserError(f"--class is {name}; expected 0 to {count - 1}")
    if net.classes is None:
        raise UserError(
            f"--class is {name!r}, but the network has no class names; expected a number: add --classes FILE"
        )
    names = [known.casefold() for known in net.classes]
    wanted = normal(name).casefold()
    found = [label for label, known in enumerate(names) if known == wanted]
    if len(found) > 1:
        raise UserError(f"classes {', '.join(map(str, found))} are called {name!r}; expected one: pass its number")
    if not found:
        close = difflib.get_close_matches(wanted, names, 3)
        near = ", ".join(net.classes[names.index(known)] for known in close)
        raise UserError(
            f"--class is {name!r}; expected the name or number of a class" + (f", for example {near}" if near else "")
        )
    return found[0]


def class_name(net: Network, label: int) -> str:
    """Return the name of a class, or its number."""
    return net.classes[label] if net.classes else str(label)


def draw(
    net: Network, image: np.ndarray, logits: np.ndarray, label: int, method: str, values: np.ndarray, caption: str
) -> PIL.Image.Image:
    """Return the picture of an explanation.

    Args:
      net: the network.
      image: (H, W, C) float32, preprocessed.
      logits: (1, classes).
      label: the explained class.
      method: one of CAPTIONS.
      values: the result of the method for the image.
      caption: the text under the explanation.
    """
    assert net.preprocessing is not None  # because the image was preprocessed
    view = net.preprocessing.to_image(image)
    pixels = np.asarray(view.convert("RGB"))
    if method == "grad-cam":
        right = picture.heat_overlay(pixels, values)
    elif method == "guided":
        right = picture.gradient_image(values[..., ::-1] if net.preprocessing.channel_order == "BGR" else values)
    else:
        right = picture.signed_overlay(pixels, values.sum(-1) if values.ndim == 3 else values)
    numbers = np.asarray(read_outputs(jnp.asarray(logits), net.outputs))[0]
    best = int(numbers.argmax())

    def described(label: int) -> str:
        number = f"{numbers[label]:.4g}" if net.outputs == "values" else f"{numbers[label]:.1%}"
        return f"{class_name(net, label)} ({number})"

    title = f"{described(label)}, predicted" if label == best else f"{described(label)}; predicted: {described(best)}"
    if net.outputs == "values":
        title = described(label)
    return picture.side_by_side([(view.convert("RGB"), "the network's view"), (right, caption)], title)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="vgg-jax explain", description=__doc__, formatter_class=Paragraphs)
    parser.add_argument("image", metavar="IMAGE", help="the image to explain")
    parser.add_argument("--out", required=True, metavar="PICTURE", help="the picture to write, as explained.png")
    parser.add_argument(
        "--weights",
        default="vgg16",
        help="a pretrained network's name, a file, or a run's directory (default: %(default)s)",
    )
    parser.add_argument(
        "--class", dest="name", metavar="NAME", help="the class, by name or number (default: the predicted one)"
    )
    parser.add_argument("--method", choices=CAPTIONS, default="grad-cam", help="(default: %(default)s)")
    parser.add_argument(
        "--layer", help=f"layer of grad-cam's map (default: the last ReLU with {SMALLEST_MAP}x{SMALLEST_MAP} positions)"
    )
    add_network_options(parser)
    options = parser.parse_args(argv)
    configure()
    return report_mistakes("explain", lambda: run(options), "choose --method grad-cam, which needs the least memory")
