"""Name what is in images.

    python -m vgg_jax predict --weights vgg16_bn|FILE|RUN IMAGE... [--top 5] [--json] [--classes FILE]

Each IMAGE is a file (JPEG, PNG, WebP, ...) or a folder of files and subfolders. Prints the most probable classes of
each image. A file that is not an image is reported on standard error, the others are still answered, and the exit code
is 1.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from vgg_jax.cli.network_options import add_network_options, load_network
from vgg_jax.cli.paragraphs import Paragraphs
from vgg_jax.console import note
from vgg_jax.data.listing import find_images
from vgg_jax.errors import UserError, report_mistakes
from vgg_jax.evaluation.programs import CompiledAhead
from vgg_jax.network import Prediction
from vgg_jax.runtime import configure
from vgg_jax.weights.download import NAMES


def as_json(prediction: Prediction) -> dict[str, Any]:
    """Return what --json prints: {"image": path, "predictions": [{"class", "name", "probability"}, ...]}.

    If the outputs are values, "values" replaces "predictions"; if the image cannot be read, "error".
    """
    if prediction.error:
        return {"image": prediction.image, "error": prediction.error}
    if prediction.values:
        return {"image": prediction.image, "values": list(prediction.values)}
    classes = zip(prediction.labels, prediction.names, prediction.probabilities, strict=True)
    return {
        "image": prediction.image,
        "predictions": [{"class": label, "name": name, "probability": p} for label, name, p in classes],
    }


def run(options: argparse.Namespace) -> int:
    """Print the predictions of the images; return the exit code: 1 if an image cannot be read."""
    for flag, value in (("--top", options.top), ("--batch-size", options.batch_size)):
        if value < 1:
            raise UserError(f"{flag} is {value}; expected 1 or more")
    files = [path for path, _ in find_images(options.images)]  # before the weights, which take seconds to load
    ahead = CompiledAhead(len(files), options.batch_size)
    net = load_network(options.weights, options, ahead.start)
    predictions = net.iter_predictions(files, options.top, options.batch_size, ahead)
    if net.classes is None and net.outputs != "values":
        note(f"{options.weights} states no class names, so classes are numbers; add --classes FILE")
    failed = 0
    for prediction in predictions:
        failed += prediction.error is not None
        if options.json:
            print(json.dumps(as_json(prediction)))
        elif prediction.error:
            print(prediction.error, file=sys.stderr)
        else:
            print(prediction.image)
            numbers = [f"{value:10.5g}" for value in prediction.values] or [
                f"{p:7.2%}" for p in prediction.probabilities
            ]
            for name, number in zip(prediction.names, numbers, strict=True):
                print(f"  {number}  {name}")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="vgg-jax predict", description=__doc__, formatter_class=Paragraphs)
    parser.add_argument("--weights", required=True, help=f"one of {', '.join(NAMES)}, a file, or a run's directory")
    parser.add_argument("--top", type=int, default=5, help="number of classes (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each image")
    parser.add_argument("--batch-size", type=int, default=32, help="images computed together (default: %(default)s)")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a file or a folder of files")
    add_network_options(parser)
    options = parser.parse_args(argv)
    configure()
    less_memory = f"lower --batch-size (now {options.batch_size})"
    return report_mistakes("predict", lambda: run(options), less_memory)
