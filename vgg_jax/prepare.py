"""Prepares a data set for training: python -m vgg_jax.prepare DATASET [--data-dir DIR] [...]

digits, cifar10, cifar100 and imagenet2012 are written here, without TensorFlow; train.py prepares them by itself too.
imagenet2012 wants its two archives in --manual-dir. A data set that is there in TFRecord format is rewritten as
array_record with --from-tfrecord, without TensorFlow as well. Any other data set of TFDS is prepared by TFDS itself,
with TensorFlow: pip install 'vgg_jax[tf]'. All end in --data-dir in the array_record format; what is there already is
left as it is, and a preparation that was stopped goes on.
"""

import argparse
import importlib.util
import os
import sys

from absl import logging

from vgg_jax.config import DataConfig
from vgg_jax.data import preparation, tfrecord
from vgg_jax.errors import UserError, first_line, report_mistakes


def prepare(name: str, data_dir: str, manual_dir: str | None = None, from_tfrecord: str | None = None) -> None:
    """Prepares one data set, as the command does.

    Raises:
      UserError: where that cannot be done, with the reason and the remedy.
    """
    if from_tfrecord:
        tfrecord.convert(name, from_tfrecord, data_dir)
    elif name in preparation.NAMES:
        preparation.prepare(name, data_dir, manual_dir)
    else:
        _prepare_by_tfds(name, data_dir, manual_dir)
    preparation.open_prepared(name, data_dir)


def _prepare_by_tfds(name: str, data_dir: str, manual_dir: str | None) -> None:
    import tensorflow_datasets as tfds

    builder = preparation.open_builder(name, data_dir, file_format="array_record")
    if builder.is_prepared():
        return
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(f"TFDS needs TensorFlow to prepare {name}: pip install tensorflow, or 'vgg_jax[tf]'")
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    except Exception as error:  # whatever the data set's own code raises
        raise UserError(f"TFDS cannot prepare {name}: {type(error).__name__}: {first_line(error)}") from error


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m vgg_jax.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="TFDS's name: imagenet2012, cifar10, imagenette, ...")
    parser.add_argument("--data-dir", default=DataConfig().data_dir, help="TFDS's data directory (%(default)s)")
    parser.add_argument("--manual-dir", help="where archives are that cannot be fetched (DATA_DIR/downloads/manual)")
    parser.add_argument("--from-tfrecord", metavar="DIR", help="the data directory with the data in TFRecord format")
    arguments = parser.parse_args()
    data_dir, manual_dir, source = (
        path and os.path.expanduser(path)
        for path in (arguments.data_dir, arguments.manual_dir, arguments.from_tfrecord)
    )
    logging.set_verbosity(logging.ERROR)

    def command() -> int:
        prepare(arguments.dataset, data_dir, manual_dir, source)
        print(f"{arguments.dataset} is in {data_dir}")
        return 0

    return report_mistakes("prepare", command)


if __name__ == "__main__":
    sys.exit(main())
