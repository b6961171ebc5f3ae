"""Prepare a data set for training.

  python -m vgg_jax prepare DATASET [--data-dir DIR] [...]

This command prepares digits, cifar10, cifar100 and imagenet2012 without TensorFlow; train.py prepares them by itself.
For imagenet2012, place the two archives in --manual-dir. With --from-tfrecord, the command rewrites a data set from
TFRecord files as array_record, also without TensorFlow. TFDS prepares every other data set, with TensorFlow:
pip install 'vgg_jax[tf]'. The result is in --data-dir, in array_record format. An existing data set stays unchanged.
Rerun the same command to resume a preparation that was stopped.
"""

import argparse
import importlib.util
import os
from collections.abc import Sequence

from vgg_jax.cli.paragraphs import Paragraphs
from vgg_jax.config import DataConfig
from vgg_jax.data.prepare import catalog, tfrecord
from vgg_jax.errors import UserError, first_line, report_mistakes, require
from vgg_jax.runtime import silence_libraries


def prepare(name: str, data_dir: str, manual_dir: str | None = None, from_tfrecord: str | None = None) -> None:
    """Prepare one data set in array_record format, unless it exists.

    Args:
      name: TFDS's name of the data set.
      data_dir: TFDS's data directory.
      manual_dir: directory of archives that the user placed; by default `data_dir`/downloads/manual.
      from_tfrecord: data directory with the same data set in TFRecord format, which is rewritten.

    Raises:
      UserError: if the data set cannot be prepared; the message has the reason and the remedy.
    """
    if from_tfrecord:
        tfrecord.convert(name, from_tfrecord, data_dir)
    elif name in catalog.NAMES:
        catalog.prepare(name, data_dir, manual_dir)
    else:
        _prepare_by_tfds(name, data_dir, manual_dir)
    catalog.open_prepared(name, data_dir)


def _prepare_by_tfds(name: str, data_dir: str, manual_dir: str | None) -> None:
    builder = catalog.open_builder(name, data_dir, file_format="array_record")
    if builder.is_prepared():
        return
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"TFDS needs TensorFlow to prepare {name}, and tensorflow is not installed: pip install 'vgg_jax[tf]'"
        )
    tfds = require("tensorflow_datasets", "train")
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    except Exception as error:  # the data set's own code may raise anything
        raise UserError(f"TFDS cannot prepare {name}: {type(error).__name__}: {first_line(error)}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="vgg-jax prepare", description=__doc__, formatter_class=Paragraphs)
    parser.add_argument("dataset", help="TFDS's name of the data set: imagenet2012, cifar10, imagenette, ...")
    parser.add_argument(
        "--data-dir", default=DataConfig().data_dir, help="TFDS's data directory (default: %(default)s)"
    )
    parser.add_argument(
        "--manual-dir", help="directory of archives that you downloaded (default: DATA_DIR/downloads/manual)"
    )
    parser.add_argument(
        "--from-tfrecord", metavar="DIR", help="data directory with the data set in TFRecord format, to be rewritten"
    )
    arguments = parser.parse_args(argv)
    data_dir, manual_dir, source = (
        path and os.path.expanduser(path)
        for path in (arguments.data_dir, arguments.manual_dir, arguments.from_tfrecord)
    )

    def command() -> int:
        logging = require("absl.logging", "train")
        logging.set_verbosity(logging.ERROR)
        silence_libraries()
        prepare(arguments.dataset, data_dir, manual_dir, source)
        print(f"{arguments.dataset} is in {data_dir}")
        return 0

    return report_mistakes("prepare", command)
