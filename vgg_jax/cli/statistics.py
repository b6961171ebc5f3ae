"""Compute the mean, the standard deviation and the principal axes of a data set's pixels.

  python -m vgg_jax statistics DATASET [--data-dir DIR] [...]

The result is printed as fields of a configuration: data.mean and data.std for the normalization,
data.color_eigenvalues and data.color_eigenvectors for AlexNet's color shift. The latter belong to the covariance of RGB
over all pixels.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from vgg_jax.cli.paragraphs import Paragraphs
from vgg_jax.config import DataConfig
from vgg_jax.console import counted
from vgg_jax.data.dataset import open_split
from vgg_jax.data.pixel_statistics import pixel_statistics, principal_axes
from vgg_jax.errors import UserError, report_mistakes, require
from vgg_jax.runtime import silence_libraries


def report(dataset: str, split: str, data_dir: str, most: int) -> None:
    """Print the statistics of a split's pixels.

    Args:
      dataset: TFDS's name of the data set, or a directory.
      split: name of the split.
      data_dir: TFDS's data directory.
      most: largest number of images to read, spread evenly over the split.

    Raises:
      UserError: if the data set cannot be read.
    """
    if most < 1:
        raise UserError(f"--images is {most}; expected 1 or more")
    examples = open_split(dataset, split, data_dir=data_dir)
    indices = np.unique(np.linspace(0, len(examples) - 1, min(most, len(examples))).astype(int))
    images = (examples.pixels(int(i))[0] for i in counted(indices, len(indices), f"reading {examples.name}", "images"))
    mean, covariance = pixel_statistics(images)
    print(f"# {len(indices)} images of {examples.name}")
    print(f"--config.data.mean={_tuple(mean)}")
    print(f"--config.data.std={_tuple(np.sqrt(np.diag(covariance)))}")
    if len(mean) == 3:
        values, vectors = principal_axes(covariance)
        print(f"--config.data.color_eigenvalues={_tuple(values)}")
        print(f"--config.data.color_eigenvectors=({','.join(_tuple(row) for row in vectors)})")


def _tuple(values: np.ndarray) -> str:
    return f"({','.join(f'{value:.4f}' for value in values)},)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="vgg-jax statistics", description=__doc__, formatter_class=Paragraphs)
    parser.add_argument("dataset", help="TFDS's name of the data set, or a directory")
    parser.add_argument("--split", default="train", help="split to read (default: %(default)s)")
    parser.add_argument(
        "--data-dir", default=DataConfig().data_dir, help="TFDS's data directory (default: %(default)s)"
    )
    parser.add_argument(
        "--images", type=int, default=20_000, help="largest number of images to read (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)

    def command() -> int:
        logging = require("absl.logging", "train")
        logging.set_verbosity(logging.ERROR)
        silence_libraries()
        report(arguments.dataset, arguments.split, arguments.data_dir, arguments.images)
        return 0

    return report_mistakes("statistics", command)
