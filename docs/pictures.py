"""Draw the pictures of the site, from the code and from the result files.

    python docs/pictures.py [NAME...]

Without names, every picture is drawn whose result file exists. The look is that of vgg_jax/look.py: a white background
of their own makes the pictures readable on light and on dark pages. Pictures of weights and photographs are drawn by
the experiments that have them.
"""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import throughput_plot  # noqa: E402 # the root of the repository has to be on the path before
from docs import architecture, speed  # noqa: E402 # as above
from experiments import (  # noqa: E402 # as above
    cifar10_comparison,
    cifar10_final,
    cifar10_plain,
    cifar10_search,
    interruptions,
    transfer_cifar10,
)

Draw = Callable[[pathlib.Path, Any], None]  # the file of the picture, the result file's content -> None


class Picture(NamedTuple):
    """A picture of the site."""

    target: str  # the file
    draw: Draw
    source: str | None = None  # the file with the figures; None if the picture is drawn from the code


def of_code(draw: Callable[[pathlib.Path], None]) -> Draw:
    """Return the function for a picture that needs no figures."""
    return lambda path, _: draw(path)


def of_experiment(name: str, draw: Draw) -> Picture:
    """Return the picture of an experiment, which lies beside its result file."""
    return Picture(f"experiments/{name}.png", draw, f"experiments/{name}.json")


PICTURES = [
    Picture("docs/pictures/columns.svg", of_code(architecture.columns)),
    Picture("docs/pictures/receptive_fields.svg", of_code(architecture.receptive_fields)),
    Picture("docs/pictures/convolution_speed.svg", speed.methods, "benchmarks/convolutions.json"),
    Picture("docs/pictures/convolution_error.svg", speed.errors, "benchmarks/convolutions.json"),
    Picture("docs/pictures/growth.svg", speed.growth, "benchmarks/growth.md"),
    Picture("docs/pictures/gpu_steps.svg", speed.gpu_steps, "docs/performance.md"),
    Picture("benchmarks/throughput.png", throughput_plot.draw, "benchmarks/throughput.json"),
    Picture("benchmarks/throughput_engines.png", throughput_plot.draw, "benchmarks/throughput_engines.json"),
    Picture("benchmarks/throughput_gpu.png", throughput_plot.draw, "benchmarks/throughput_gpu.json"),
    of_experiment("cifar10_final", cifar10_final.draw),
    of_experiment("cifar10_search", cifar10_search.draw),
    of_experiment("cifar10_search_long", cifar10_search.draw),
    of_experiment("cifar10_plain", cifar10_plain.draw),
    of_experiment("cifar10_comparison", cifar10_comparison.draw),
    of_experiment("transfer_cifar10_sizes", transfer_cifar10.draw),
    of_experiment("interruptions", interruptions.draw),
]


def draw(picture: Picture, root: pathlib.Path = ROOT) -> bool:
    """Draw a picture if its result file exists, and return whether it does.

    Args:
      picture: the picture.
      root: the folder of the result file and of the picture.
    """
    found: Any = None
    if picture.source:
        if not (root / picture.source).exists():
            return False
        text = (root / picture.source).read_text()
        found = json.loads(text) if picture.source.endswith(".json") else text
    picture.draw(root / picture.target, found)
    return True


def main(names: list[str]) -> None:
    """Draw the pictures with these names, or all, and print their files."""
    known = {pathlib.PurePath(picture.target).stem: picture for picture in PICTURES}
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(
            f"found no picture {', '.join(unknown)}; expected some of {', '.join(known)}: choose from them"
        )
    for name in names or known:
        print(known[name].target, "" if draw(known[name]) else f"not drawn: {known[name].source} is missing")


if __name__ == "__main__":
    main(sys.argv[1:])
