"""The data sets that are prepared without TensorFlow, and TFDS's builders of prepared data sets."""

import glob
import os
from typing import Any

from vgg_jax.data.prepare import cifar, digits, imagenet
from vgg_jax.errors import UserError, first_line, require

INFO = "dataset_info.json"  # the file that marks a data set of TFDS
NAMES = (digits.NAME, *cifar.ARCHIVES, imagenet.NAME)


def prepare(name: str, data_dir: str, manual_dir: str | None = None) -> None:
    """Prepare one of `NAMES` in `data_dir`, unless it exists.

    Args:
      name: one of `NAMES`.
      data_dir: TFDS's data directory.
      manual_dir: directory of archives that the user placed; by default `data_dir`/downloads/manual.

    Raises:
      UserError: if the data set cannot be prepared; the message has the reason and the remedy.
    """
    if name == digits.NAME:
        digits.prepare(data_dir)
    elif name == imagenet.NAME:
        imagenet.prepare(data_dir, manual_dir)
    else:
        cifar.prepare(name, data_dir, manual_dir)


def is_directory(dataset: str) -> bool:
    """Return whether a data set is given by a directory rather than by TFDS's name."""
    return os.sep in dataset or dataset.startswith((".", "~"))


def versions(directory: str) -> list[str]:
    """Return the directories of TFDS's data sets inside a directory, such as one for each version."""
    found = (glob.glob(os.path.join(glob.escape(directory), *depth, INFO)) for depth in (("*",), ("*", "*")))
    return sorted(os.path.dirname(path) for paths in found for path in paths)


def open_builder(dataset: str, data_dir: str, **options: Any) -> Any:
    """Return TFDS's builder of a data set, prepared or not.

    Args:
      dataset: TFDS's name of the data set, or its directory.
      data_dir: TFDS's data directory.
      **options: further arguments of `tfds.builder`.

    Raises:
      UserError: if TFDS knows no such data set, or cannot read its files.
    """
    tfds = require("tensorflow_datasets", "train")
    try:
        if is_directory(dataset):
            return tfds.builder_from_directory(os.path.expanduser(dataset))
        return tfds.builder(dataset, data_dir=data_dir, try_gcs=False, **options)
    except Exception as error:  # TFDS raises many kinds, for unknown names and versions and for unreadable files
        if not is_directory(dataset) and os.path.isdir(dataset):
            raise UserError(
                f"TFDS has no data set {dataset!r}, and a directory is given with a /: did you mean ./{dataset}?"
            ) from None
        raise UserError(
            f"{dataset!r} cannot be opened as a data set of TFDS in {data_dir}: {first_line(error)}; choose a "
            "directory, or a name from https://www.tensorflow.org/datasets/catalog/overview"
        ) from None


def open_prepared(dataset: str, data_dir: str) -> Any:
    """Return TFDS's builder of a data set that is prepared in array_record format.

    Args:
      dataset: TFDS's name of the data set, or its directory.
      data_dir: TFDS's data directory.

    Raises:
      UserError: if the data set is not prepared, or has another format; the message has the remedy.
    """
    builder = open_builder(dataset, data_dir)
    if not builder.is_prepared():
        raise UserError(
            f"{builder.info.full_name} is not in {builder.data_dir}: set --config.data.data_dir (or TFDS_DATA_DIR) to "
            f"its data directory, or prepare it: python -m vgg_jax prepare {dataset} --data-dir {data_dir}"
        )
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise UserError(
            f"{builder.data_dir} is in {file_format} format; expected array_record; rewrite it in another directory: "
            f"python -m vgg_jax prepare {dataset} --from-tfrecord {data_dir} --data-dir DIR"
        )
    return builder
