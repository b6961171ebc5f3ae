"""One split of a TFDS data set, by random access and without TensorFlow: an index to a uint8 image and a label."""

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

from vgg_jax.config import Config, DataConfig
from vgg_jax.data import preparation, views
from vgg_jax.data.folder import FolderRecords
from vgg_jax.data.order import permutation
from vgg_jax.errors import UserError, first_line


class CorruptImageError(UserError):
    """An image that cannot be decoded."""


@dataclass(frozen=True)
class Split:
    """One split: `len(split)` examples, read and decoded one at a time."""

    name: str  # dataset/split, for messages
    records: Any  # by random access: an encoded image and a label; locate(index) says where it is
    num_classes: int
    channels: int
    config: DataConfig  # whose views they become

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

    @property
    def view_bytes(self) -> int:
        """The bytes of one view."""
        return self.config.image_size**2 * self.channels

    @property
    def random_views(self) -> bool:
        """Whether the host draws the training views; else the device does, of the test views."""
        return self.config.train_view != "pad_crop"

    def test_view(self, index: int) -> tuple[np.ndarray, np.int32]:
        """The image's test view, (image_size, image_size, C) uint8, and its label.

        Raises:
          CorruptImageError: where the image cannot be decoded.
          UserError: where its record cannot be read, or the label is none of the classes.
        """
        data, label = self._read(index)
        with self._names_corrupt_image(index):
            image = views.to_mode(PIL.Image.open(io.BytesIO(data)), self._mode)
        return views.centre_crop(views.resize_short_side(image, self.config.resize), self.config.image_size), label

    def random_view(self, index: int, seed: int, position: int) -> tuple[np.ndarray, np.int32]:
        """The training view that the host draws, as `test_view`; a pure function of its arguments."""
        pixels, label = self.pixels(index)
        size = self.config.image_size
        if self.config.train_view == "scale_crop":
            smallest, largest = self.config.train_scale
            return views.scale_crop(pixels, size, smallest, largest, seed, position), label
        return views.random_resized_crop(pixels, size, seed, position), label

    def image(self, index: int) -> tuple[PIL.Image.Image, np.int32]:
        """The same as `pixels`, as a PIL image, without what a file says besides."""
        pixels, label = self.pixels(index)
        return PIL.Image.fromarray(pixels[..., 0] if self.channels == 1 else pixels), label

    def pixels(self, index: int) -> tuple[np.ndarray, np.int32]:
        """The whole image, (H, W, C) uint8, and its label; raises as `test_view`."""
        data, label = self._read(index)
        with self._names_corrupt_image(index):
            return views.decode(data, self._mode), label

    @property
    def _mode(self) -> str:
        return "L" if self.channels == 1 else "RGB"

    def _read(self, index: int) -> tuple[bytes, np.int32]:
        record = self.records[int(index)]
        label = record["label"]
        if not 0 <= label < self.num_classes:
            raise UserError(
                f"{self.name}, example {index}, {self.records.locate(index)}: label {label}; "
                f"expected 0 up to {self.num_classes - 1}"
            )
        return record["image"], np.int32(label)

    @contextlib.contextmanager
    def _names_corrupt_image(self, index: int) -> Iterator[None]:
        try:
            yield
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
            record = self.records[int(index)]
            name = record.get("file_name", record.get("id", ""))
            name = name.decode() if isinstance(name, bytes) else name
            raise CorruptImageError(
                f"{self.name}, example {index}{name and f' ({name})'}, {self.records.locate(index)}: "
                f"the image cannot be decoded: {first_line(error)}"
            ) from None


@dataclass(frozen=True)
class _Selection:
    """Some records of a source, in their order."""

    records: Any
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.records[int(self.indices[index])]

    def locate(self, index: int) -> str:
        return self.records.locate(int(self.indices[index]))


def open_splits(config: Config) -> tuple[Split, Split]:
    """The training and the evaluation split of `config`, of those classes and with so many images as it says.

    Raises:
      UserError: as `open_split` and `Split.select`.
    """
    data = config.data
    train_split, eval_split = (open_split(data, name) for name in (data.train_split, data.eval_split))
    return train_split.select(data.classes, data.images_per_class, config.seed), eval_split.select(data.classes)


def open_split(config: DataConfig, split: str) -> Split:
    """Opens one split of the data set that `config` names, and prepares it first where that needs no TensorFlow.

    Raises:
      UserError: where the data set or the split is missing, empty, or not in array_record format.
    """
    directory, data_dir = os.path.expanduser(config.dataset), os.path.expanduser(config.data_dir)
    if preparation.is_directory(config.dataset) and not os.path.exists(os.path.join(directory, "dataset_info.json")):
        folder = FolderRecords(directory, split, config.train_split)
        return Split(f"{config.dataset}/{split}", folder, len(folder.classes), 3, config)

    import tensorflow_datasets as tfds

    if config.dataset in preparation.NAMES and "://" not in data_dir:  # in a bucket it is only read
        preparation.prepare(config.dataset, data_dir)
    try:
        builder = preparation.open_prepared(config.dataset, data_dir)
    except UserError as error:
        raise UserError(f"config.data.dataset is {config.dataset!r}: {error}") from None
    splits = builder.info.splits
    try:
        empty = splits[split].num_examples <= 0
    except (KeyError, ValueError):  # no such split, or part of one
        empty = True
    if empty:
        found = ", ".join(f"{name} ({s.num_examples})" for name, s in splits.items())
        raise UserError(f"split {split!r} of {builder.info.full_name} is missing or empty; found {found}")
    features = builder.info.features
    if "image" not in features or "label" not in features or not getattr(features["label"], "num_classes", None):
        raise UserError(
            f"{builder.info.full_name} has {', '.join(features)}; expected an image, and a label of classes"
        )
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return Split(
        name=f"{config.dataset}/{split}",
        records=_ArrayRecords(source, splits[split].file_instructions),
        num_classes=features["label"].num_classes,
        channels=features["image"].shape[-1],
        config=config,
    )


class _ArrayRecords:
    """The records of a split in array_record files, and where each is."""

    def __init__(self, source: Any, files: Sequence[Any]) -> None:
        self._source, self._files = source, files
        self._ends = np.cumsum([file.examples_in_shard if file.take == -1 else file.take for file in files])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._source[index]
        except Exception as error:  # array_record raises several kinds, and TFDS others for bytes that are no example
            raise UserError(
                f"{self.locate(index)} cannot be read, the file is damaged: {first_line(error)}; "
                "prepare the data set again, or take the file from another copy"
            ) from None

    def locate(self, index: int) -> str:
        """The file of a record, and its place there."""
        i = int(np.searchsorted(self._ends, index, "right"))
        first = self._ends[i - 1] if i else 0
        return f"{self._files[i].filename}, record {self._files[i].skip + index - first}"


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
    multiple = num_devices * config.accumulation_steps
    if config.batch_size % multiple:
        below = config.batch_size // multiple * multiple
        valid = [size for size in (below, below + multiple) if size]
        parts = f" in {config.accumulation_steps} steps" if config.accumulation_steps > 1 else ""
        problems.append(
            f"config.batch_size is {config.batch_size}; expected a multiple of {multiple}, for {num_devices} "
            f"devices{parts}: the nearest are {' and '.join(map(str, valid))}"
        )
    widths = (512 * config.model.pool_size**2, *config.model.hidden)
    if config.shard_head and any(width % num_devices for width in widths):
        problems.append(
            f"config.shard_head divides the dense layers' inputs, {', '.join(map(str, widths))}, among {num_devices} "
            "devices; expected multiples of that, or config.shard_head=False"
        )
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
