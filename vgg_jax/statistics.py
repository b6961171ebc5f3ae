"""The mean, the deviation and the principal axes of a data set's pixels: python -m vgg_jax.statistics DATASET [...]

Prints them as fields of a configuration: data.mean and data.std for the normalisation, data.color_eigenvalues and
data.color_eigenvectors for the colour shift, those of the covariance of RGB over all pixels, as AlexNet's authors did.
"""

import argparse
import sys
from collections.abc import Iterable

import numpy as np
from absl import logging
from tqdm import tqdm

from vgg_jax.config import DataConfig
from vgg_jax.data.sources import open_split
from vgg_jax.errors import UserError, report_mistakes


def pixel_statistics(images: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The mean (C,) and the covariance (C, C) of the pixels in [0, 1] of (H, W, C) uint8 images, in float64."""
    count, total, products = 0, np.zeros(()), np.zeros(())
    for image in images:
        pixels = image.reshape(-1, image.shape[-1]).astype(np.float64) / 255
        count += len(pixels)
        total = total + pixels.sum(0)
        products = products + pixels.T @ pixels
    mean = total / count
    return mean, products / count - np.outer(mean, mean)


def principal_axes(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eigenvalues, the largest first, and the eigenvectors as columns, of which the first row is negative or 0."""
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1]
    return values, np.where(vectors[0] > 0, -vectors, vectors)


def report(config: DataConfig, split: str, most: int) -> None:
    """Reads up to `most` images of a split, evenly spread, and prints the fields.

    Raises:
      UserError: where the data set cannot be read.
    """
    if most < 1:
        raise UserError(f"--images is {most}; expected 1 or more")
    examples = open_split(config, split)
    indices = np.unique(np.linspace(0, len(examples) - 1, min(most, len(examples))).astype(int))
    images = (examples.pixels(i)[0] for i in tqdm(indices, unit=" images", disable=None))
    mean, covariance = pixel_statistics(images)
    print(f"# of {len(indices)} images of {examples.name}")
    print(f"--config.data.mean={_tuple(mean)}")
    print(f"--config.data.std={_tuple(np.sqrt(np.diag(covariance)))}")
    if len(mean) == 3:
        values, vectors = principal_axes(covariance)
        print(f"--config.data.color_eigenvalues={_tuple(values)}")
        print(f"--config.data.color_eigenvectors=({','.join(_tuple(row) for row in vectors)})")


def _tuple(values: np.ndarray) -> str:
    return f"({','.join(f'{value:.4f}' for value in values)},)"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m vgg_jax.statistics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="as config.data.dataset: TFDS's name, or a directory")
    parser.add_argument("--split", default="train")
    parser.add_argument("--data-dir", default=DataConfig().data_dir, help="TFDS's data directory (%(default)s)")
    parser.add_argument("--images", type=int, default=20_000, help="at most so many (%(default)s)")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)

    def command() -> int:
        report(DataConfig(arguments.dataset, arguments.data_dir), arguments.split, arguments.images)
        return 0

    return report_mistakes("statistics", command)


if __name__ == "__main__":
    sys.exit(main())
