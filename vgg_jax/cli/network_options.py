"""The options of every command that loads a network: what its file does not state, or states wrongly."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from vgg_jax.data.listing import normal
from vgg_jax.data.preprocessing import AUTHORS, CHANNEL_ORDERS, CIFAR10, IMAGENET, Preprocessing
from vgg_jax.errors import UserError
from vgg_jax.network import Network, load
from vgg_jax.weights.metadata import OUTPUTS

PREPROCESSINGS = {"imagenet": IMAGENET, "authors": AUTHORS, "cifar10": CIFAR10}


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `load_network` to a command."""
    group = parser.add_argument_group("network", "in place of what the source of the weights states")
    group.add_argument(
        "--preprocessing",
        choices=PREPROCESSINGS,
        help="torchvision's for ImageNet; the paper authors' (BGR, mean subtracted); CIFAR-10's at 32x32",
    )
    group.add_argument("--mean", metavar="R,G,B", help="mean of each channel, for pixels in [0, 1]: 0.485,0.456,0.406")
    group.add_argument("--std", metavar="R,G,B", help="standard deviation of each channel, for pixels in [0, 1]")
    group.add_argument("--resize", type=int, metavar="SIDE", help="short side of the resized image in pixels")
    group.add_argument("--crop", type=int, metavar="SIDE", help="side of the center crop in pixels")
    group.add_argument(
        "--channel-order",
        choices=CHANNEL_ORDERS,
        help="order of the channels, also in --mean and --std (default: L for one mean, else RGB)",
    )
    group.add_argument("--no-exif", action="store_true", help="leave photographs as stored, without the EXIF turn")
    group.add_argument("--classes", metavar="FILE", help="names of the classes by label, one a line, in UTF-8")
    group.add_argument("--features-only", action="store_true", help="load the convolutional part without the head")
    group.add_argument("--outputs", choices=OUTPUTS, help="what the outputs mean (default: as the source states)")
    group.add_argument("--step", default="latest", help="checkpoint of a run: latest, best or a step (default: latest)")


def load_network(
    source: str, options: argparse.Namespace, announce: Callable[[Network], None] | None = None
) -> Network:
    """Return the network at `source`, read as the options of `add_network_options` say.

    Args:
      source: as for `vgg_jax.load`.
      options: the parsed options.
      announce: as for `vgg_jax.load`, with the options applied to the network.

    Raises:
      UserError: as `vgg_jax.load`, or if an option cannot be used. Wrong options are refused before the weights load.
    """
    named = PREPROCESSINGS.get(options.preprocessing)
    given = _given_fields(options)
    _completed(named or _fitting(given), given)  # checks the values
    classes = read_names(options.classes) if options.classes else None

    def completed(net: Network) -> Network:
        stated = named or net.preprocessing
        if given and stated is None:
            missing = [name for name in ("mean", "std", "resize", "crop") if name not in given]
            if missing:
                raise UserError(
                    f"{source} does not state the preprocessing of its images; found no "
                    f"{', '.join('--' + name for name in missing)}: pass all of --mean, --std, --resize and --crop, or "
                    f"add --preprocessing {', '.join(PREPROCESSINGS)}"
                )
            stated = _fitting(given)
        return dataclasses.replace(net, preprocessing=_completed(stated, given) if stated else None)

    net = load(
        source,
        features_only=options.features_only,
        classes=classes,
        outputs=options.outputs,
        step=options.step,
        announce=announce and (lambda net: announce(completed(net))),
    )
    return completed(net)


def read_names(path: str) -> tuple[str, ...]:
    """Return the class names in a file.

    Raises:
      UserError: if the file cannot be read, is not UTF-8, or has an empty line before its end.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = [normal(line.strip()) for line in file.read().rstrip().split("\n")]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not in UTF-8; expected the names of the classes: convert the file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; expected a file with a class name a line") from None
    if "" in names:
        raise UserError(f"{path}: line {names.index('') + 1} is empty; expected a class name in each line")
    return tuple(names)


def _given_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of the preprocessing that the options give one by one."""
    fields = {
        "resize": options.resize,
        "crop": options.crop,
        "mean": options.mean and _numbers("--mean", options.mean),
        "std": options.std and _numbers("--std", options.std),
        "channel_order": options.channel_order,
        "exif": False if options.no_exif else None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} is {text!r}; expected numbers with commas between them, as 0.5,0.5,0.5") from None


def _fitting(given: dict[str, Any]) -> Preprocessing:
    """Return a preprocessing that is valid with the given fields, if these are: others follow from them."""
    given_values = given.get("mean") or given.get("std")
    channels = 1 if given.get("channel_order") == "L" else len(given_values or IMAGENET.mean)
    return Preprocessing(
        resize=given.get("crop", IMAGENET.resize),
        crop=min(given.get("resize", IMAGENET.crop), IMAGENET.crop),
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
        channel_order="L" if channels == 1 else "RGB",
    )


def _completed(preprocessing: Preprocessing, given: dict[str, Any]) -> Preprocessing:
    """Return the preprocessing with the given fields replaced; raise UserError for wrong values."""
    if "mean" in given and "channel_order" not in given and (len(given["mean"]) == 1) != (len(preprocessing.mean) == 1):
        given = {**given, "channel_order": "L" if len(given["mean"]) == 1 else "RGB"}
    completed = dataclasses.replace(preprocessing, **given)
    if given:
        completed.check()
    return completed
