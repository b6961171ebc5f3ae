"""One split of a TFDS data set, by random access and without TensorFlow: an index to a uint8 image and a label."""

import dataclasses
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

from vgg_jax.config import Config, DataConfig
from vgg_jax.data import digits, views
from vgg_jax.data.order import permutation
from vgg_jax.errors import UserError


@dataclass(frozen=True)
class Split:
    """One split: `len(split)` examples, read and decoded one at a time."""

    name: str  # dataset/split, for messages
    records: Any  # TFDS's random-access source, its images still encoded
    num_classes: int
    channels: int
    image_size: int
    resize: int

    def select(self, classes: Sequence[int], per_class: int = 0, seed: int = 0) -> "Split":
        """The examples whose label is among `classes`, or all; of each class `per_class` drawn by `seed`, or all.

        Raises:
          UserError: where a class is unknown or has too few examples.
        """
        if not classes and not per_class:
            return self
        labels = np.array([self.records[i]["label"] for i in range(len(self))])
        chosen: list[int] = []
        for label in classes or range(self.num_classes):
            (found,) = np.nonzero(labels == label)
            if len(found) < max(per_class, 1):
                raise UserError(
                    f"{self.name} has {len(found)} examples of class {label}; expected at least {max(per_class, 1)}, "
                    "for config.data.classes and images_per_class"
                )
            chosen += list(found[permutation(seed, label, len(found))[: per_class or None]])
        return dataclasses.replace(self, records=_Selection(self.records, np.sort(chosen)))

    def __len__(self) -> int:
        return len(self.records)

    def test_view(self, index: int) -> tuple[np.ndarray, np.int32]:
        """The image's test view, (image_size, image_size, C) uint8, and its label."""
        image, label = self._read(index)
        return views.centre_crop(views.resize_short_side(image, self.resize), self.image_size), label

    def random_view(self, index: int, seed: int, position: int) -> tuple[np.ndarray, np.int32]:
        """A random resized crop, (image_size, image_size, C) uint8, and the label; a pure function of its arguments."""
        image, label = self._read(index)
        return views.random_resized_crop(image, self.image_size, seed, position), label

    def _read(self, index: int) -> tuple[PIL.Image.Image, np.int32]:
        record = self.records[int(index)]
        image = PIL.Image.open(io.BytesIO(record["image"]))
        return views.to_mode(image, "L" if self.channels == 1 else "RGB"), np.int32(record["label"])


@dataclass(frozen=True)
class _Selection:
    """Some records of a source, in their order."""

    records: Any
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.records[int(self.indices[index])]


def open_splits(config: Config) -> tuple[Split, Split]:
    """The training and the evaluation split of `config`, of those classes and with so many images as it says.

    Raises:
      UserError: as `open_split` and `Split.select`.
    """
    data = config.data
    train_split, eval_split = (open_split(data, name) for name in (data.train_split, data.eval_split))
    return train_split.select(data.classes, data.images_per_class, config.seed), eval_split.select(data.classes)


def open_split(config: DataConfig, split: str) -> Split:
    """Opens one split of the data set that `config` names.

    Raises:
      UserError: where the data set or the split is missing, empty, or not in array_record format.
    """
    import tensorflow_datasets as tfds

    data_dir = os.path.expanduser(config.data_dir)
    if config.dataset == digits.NAME:
        digits.prepare(data_dir)
    try:
        builder = tfds.builder(config.dataset, data_dir=data_dir, try_gcs=False)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"config.data.dataset is {config.dataset!r}, which is neither in {data_dir} nor known to TFDS: {reason}"
        ) from None
    if not builder.is_prepared():
        raise UserError(
            f"{builder.info.full_name} is not in {builder.data_dir}: set --config.data.data_dir (or TFDS_DATA_DIR) to "
            "where it is, or prepare it there, where tensorflow is installed, with: python -c 'import "
            f'tensorflow_datasets as tfds; tfds.builder("{config.dataset}", data_dir="{data_dir}", '
            f'file_format="array_record").download_and_prepare()\''
        )
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise UserError(
            f"{builder.data_dir} is in {file_format} format; expected array_record: where tensorflow and apache_beam "
            f"are installed, `tfds convert_format --dataset_dir={builder.data_dir} --out_file_format=array_record "
            "--out_dir=DIR` converts it"
        )
    splits = builder.info.splits
    if split not in splits or not splits[split].num_examples:
        found = ", ".join(f"{name} ({s.num_examples})" for name, s in splits.items())
        raise UserError(f"split {split!r} of {builder.info.full_name} is missing or empty; found {found}")
    features = builder.info.features
    if "image" not in features or "label" not in features:
        raise UserError(f"{builder.info.full_name} has {', '.join(features)}; expected an image and a label")
    return Split(
        name=f"{config.dataset}/{split}",
        records=builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}),
        num_classes=features["label"].num_classes,
        channels=features["image"].shape[-1],
        image_size=config.image_size,
        resize=config.resize,
    )


def check_config(config: Config, train_split: Split, eval_split: Split, num_devices: int) -> None:
    """Checks the configuration against the data and the devices.

    Raises:
      UserError: with one line for each problem: what was found and what is allowed.
    """
    problems = []
    for split in (train_split, eval_split):
        if split.num_classes > config.model.num_classes:
            problems.append(
                f"config.model.num_classes is {config.model.num_classes}; "
                f"expected at least {split.num_classes}, the classes of {split.name}"
            )
        if split.channels != len(config.data.mean):
            problems.append(
                f"config.data.mean and std have {len(config.data.mean)} channels; "
                f"expected {split.channels}, as the images of {split.name}"
            )
    if len(train_split) < config.batch_size:
        problems.append(
            f"config.batch_size is {config.batch_size}; expected at most {len(train_split)}, "
            f"the examples of {train_split.name}"
        )
    if config.batch_size % num_devices:
        below = config.batch_size // num_devices * num_devices
        valid = [size for size in (below, below + num_devices) if size]
        problems.append(
            f"config.batch_size is {config.batch_size}; expected a multiple of the {num_devices} devices: "
            f"the nearest are {' and '.join(map(str, valid))}"
        )
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
