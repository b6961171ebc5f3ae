"""Which data sets are prepared here, without TensorFlow; and TFDS's builder of one that is prepared."""

import os
from typing import Any

from vgg_jax.data import cifar, digits, imagenet
from vgg_jax.errors import UserError, first_line

NAMES = (digits.NAME, *cifar.ARCHIVES, imagenet.NAME)


def prepare(name: str, data_dir: str, manual_dir: str | None = None) -> None:
    """Prepares one of `NAMES` in `data_dir`, TFDS's data directory, where it is not there yet.

    Args:
      name: one of `NAMES`.
      data_dir: TFDS's data directory.
      manual_dir: where archives are that a user placed; by default `data_dir`/downloads/manual.

    Raises:
      UserError: where that cannot be done, with the reason and the remedy.
    """
    if name == digits.NAME:
        digits.prepare(data_dir)
    elif name == imagenet.NAME:
        imagenet.prepare(data_dir, manual_dir)
    else:
        cifar.prepare(name, data_dir, manual_dir)


def is_directory(dataset: str) -> bool:
    """Whether a data set is named by a directory, rather than as TFDS names it."""
    return os.sep in dataset or dataset.startswith((".", "~"))


def open_builder(dataset: str, data_dir: str, **options: Any) -> Any:
    """TFDS's builder of a data set, prepared or not.

    Raises:
      UserError: where TFDS knows none of that name, or its files cannot be read.
    """
    import tensorflow_datasets as tfds

    try:
        if is_directory(dataset):
            return tfds.builder_from_directory(os.path.expanduser(dataset))
        return tfds.builder(dataset, data_dir=data_dir, try_gcs=False, **options)
    except Exception as error:  # TFDS raises many kinds, for names, versions and files that it cannot read
        raise UserError(
            f"{dataset!r} cannot be opened as a data set of TFDS in {data_dir}: {first_line(error)}; names are those "
            "of https://www.tensorflow.org/datasets/catalog/overview"
        ) from None


def open_prepared(dataset: str, data_dir: str) -> Any:
    """The builder of a data set that is there in array_record format.

    Raises:
      UserError: where it is not, with the way to it.
    """
    builder = open_builder(dataset, data_dir)
    if not builder.is_prepared():
        raise UserError(
            f"{builder.info.full_name} is not in {builder.data_dir}: set --config.data.data_dir (or TFDS_DATA_DIR) to "
            f"where it is, or prepare it: python -m vgg_jax.prepare {dataset} --data-dir {data_dir}"
        )
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise UserError(
            f"{builder.data_dir} is in {file_format} format; expected array_record: python -m vgg_jax.prepare "
            f"{dataset} --from-tfrecord {data_dir} --data-dir DIR rewrites it in another directory"
        )
    return builder
