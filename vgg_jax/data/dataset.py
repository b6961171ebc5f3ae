"""One split of a data set, read by random access and without TensorFlow: an index becomes a uint8 image and a label.

A label is an int32 class, or float32 numbers (K,); see `data.labels`.
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image

from vgg_jax.console import note
from vgg_jax.data import image_files, transforms
from vgg_jax.data.array_records import ArrayRecords
from vgg_jax.data.gray_depth import ImageError
from vgg_jax.data.image_folder import FolderRecords, remedy
from vgg_jax.data.labels import KINDS, Label, label_kind, read_label
from vgg_jax.data.prepare import catalog
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.data.sampler import permutation
from vgg_jax.data.transforms import Views
from vgg_jax.errors import UserError, first_line, require

_note_once = functools.cache(note)  # two splits of a folder have notes in common


class CorruptImageError(UserError):
    """An image that cannot be decoded."""


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a data set: `len(split)` examples, each read and decoded on request."""

    name: str  # DATASET/SPLIT, for messages
    records: Any  # a sequence of dicts with `image` (encoded) and `label`; its locate(index) names a record's place
    num_classes: int  # of classes, or of the numbers in a label
    channels: int
    views: Views
    class_names: tuple[str, ...] = ()  # by label; () if they are unknown
    label_kind: str = "class"  # one of `labels.KINDS`

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Return the shape of a label: () for one class, else (K,)."""
        return () if self.label_kind == "class" else (self.num_classes,)

    def select(self, classes: Sequence[int], per_class: int = 0, seed: int = 0) -> "Split":
        """Return the split of some examples, in their order.

        Args:
          classes: labels of the examples to keep; empty keeps all classes.
          per_class: number of examples of each class, drawn at random; 0 keeps all.
          seed: seed of the draw.

        Raises:
          UserError: if a class is unknown or has too few examples, or the labels are not single classes.
        """
        if not classes and not per_class:
            return self
        if self.label_shape:
            raise UserError(
                f"{self.name} has labels of {KINDS[self.label_kind]}; expected one class for each image to select "
                "classes: unset config.data.classes and config.data.images_per_class"
            )
        labels = self.labels
        chosen: list[int] = []
        for label in classes or range(self.num_classes):
            (found,) = np.nonzero(labels == label)
            if len(found) < max(per_class, 1):
                raise UserError(
                    f"{self.name} has {len(found)} examples of class {label}; expected at least {max(per_class, 1)}; "
                    "change config.data.classes or config.data.images_per_class"
                )
            chosen += list(found[permutation(seed, label, len(found))[: per_class or None]])
        return dataclasses.replace(self, records=_Selection(self.records, np.sort(chosen)))

    def at(self, indices: Sequence[int]) -> "Split":
        """Return the split of the examples at these indices, in this order."""
        return dataclasses.replace(self, records=_Selection(self.records, np.asarray(indices)))

    def relabel(self, labels: Sequence[int], class_names: Sequence[str]) -> "Split":
        """Return the split with the labels of a network.

        Args:
          labels: the new label of each class of the split.
          class_names: the names of all classes of the network.
        """
        records = _Relabeled(self.records, tuple(labels))
        return dataclasses.replace(self, records=records, num_classes=len(class_names), class_names=tuple(class_names))

    def decoded_for(self, preprocessing: Preprocessing) -> "Split":
        """Return the split with the EXIF rule of a network, and if it is a folder, with the network's channels."""
        views = dataclasses.replace(self.views, exif=preprocessing.exif)
        source = self.records
        while isinstance(source, _Selection | _Relabeled):
            source = source.records
        channels = len(preprocessing.mean) if isinstance(source, FolderRecords) else self.channels
        return dataclasses.replace(self, channels=channels, views=views)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def view_shape(self) -> tuple[int, int, int]:
        """Return the shape (H, W, C) of a view."""
        return (self.views.image_size, self.views.image_size, self.channels)

    @property
    def view_dtype(self) -> np.dtype[Any]:
        """Return the dtype of a view."""
        return np.dtype(np.uint8)

    @property
    def view_bytes(self) -> int:
        """Return the size of one view in bytes."""
        return math.prod(self.view_shape) * self.view_dtype.itemsize

    @property
    def labels(self) -> np.ndarray:
        """Return the class of each example, (N,) int64; only a folder needs no reading of its files."""
        return _labels(self.records).astype(np.int64)

    @property
    def random_views(self) -> bool:
        """Return whether the host draws the training views; otherwise the device draws them from test views."""
        return self.views.train_view != "pad_crop"

    def test_view(self, index: int) -> tuple[np.ndarray, Label]:
        """Return the test view of an example, (image_size, image_size, C) uint8, and its label.

        Raises:
          CorruptImageError: if the image cannot be decoded.
          UserError: if the record cannot be read, if the label is not one of the classes, or if simplejpeg is missing.
        """
        pixels, label = self.pixels(index)
        return image_files.center_view(pixels, self.views.resize, self.views.image_size), label

    def random_view(self, index: int, seed: int, position: int) -> tuple[np.ndarray, Label]:
        """Return the training view that the host draws, and the label.

        Args:
          index: the example.
          seed: seed of the run.
          position: place of the example in the run; each place has its own random numbers.

        Returns:
          The view, (image_size, image_size, C) uint8, and the label. Equal arguments give equal views.

        Raises:
          CorruptImageError, UserError: as `test_view`.
        """
        pixels, label = self.pixels(index)
        size = self.views.image_size
        if self.views.train_view == "scale_crop":
            smallest, largest = self.views.train_scale
            return transforms.scale_crop(pixels, size, smallest, largest, seed, position), label
        return transforms.random_resized_crop(pixels, size, seed, position), label

    def image(self, index: int) -> tuple[PIL.Image.Image, Label]:
        """Return the whole image as a PIL image without the file's metadata, and the label; raise as `test_view`."""
        pixels, label = self.pixels(index)
        return PIL.Image.fromarray(pixels[..., 0] if self.channels == 1 else pixels), label

    def pixels(self, index: int) -> tuple[np.ndarray, Label]:
        """Return the whole image, (H, W, C) uint8, and the label; raise as `test_view`."""
        data, label = self.encoded(index)
        with self._names_corrupt_image(index):
            return image_files.decode_file(data, self._mode, self.views.exif), label

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of the whole image, from the file's header if possible; raise as `test_view`."""
        data, _ = self.encoded(index)
        with self._names_corrupt_image(index):
            return image_files.file_size(data, self._mode, self.views.exif)

    @property
    def _mode(self) -> str:
        return "L" if self.channels == 1 else "RGB"

    def encoded(self, index: int) -> tuple[bytes, Label]:
        """Return the bytes of an example's file, and the label; raise UserError if the record cannot be read."""
        record = self.records[int(index)]
        try:
            return record["image"], read_label(self.label_kind, record["label"], self.num_classes)
        except UserError as error:
            raise UserError(
                f"{self.name}, example {index}, {self.records.locate(index)}: {error}; correct the label or prepare "
                "the data set again"
            ) from None

    @contextlib.contextmanager
    def _names_corrupt_image(self, index: int) -> Iterator[None]:
        """Raise CorruptImageError with the example's name if the body cannot decode its image."""
        try:
            yield
        except image_files.DECODING_ERRORS as error:
            if isinstance(error, UserError) and not isinstance(error, ImageError):
                raise
            record = self.records[int(index)]
            name = record.get("file_name", record.get("id", ""))
            name = name.decode() if isinstance(name, bytes) else name
            raise CorruptImageError(
                f"{self.name}, example {index}{name and f' ({name})'}, {self.records.locate(index)}: "
                f"the image cannot be decoded: {first_line(error)}"
            ) from None


def _labels(records: Any) -> np.ndarray:
    """Return the labels of all records; those of a folder without reading its files."""
    if isinstance(records, FolderRecords):
        return np.array(records.labels)
    if isinstance(records, _Selection):
        chosen: np.ndarray = _labels(records.records)[records.indices]
        return chosen
    if isinstance(records, _Relabeled):
        return np.array([records.new_label(old) for old in _labels(records.records)])
    return np.array([records[i]["label"] for i in range(len(records))])


@dataclasses.dataclass(frozen=True)
class _Selection:
    """Some records of a source, in their order."""

    records: Any
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.records[int(self.indices[index])]

    def locate(self, index: int) -> str:
        return str(self.records.locate(int(self.indices[index])))


@dataclasses.dataclass(frozen=True)
class _Relabeled:
    """The records of a source with other labels."""

    records: Any
    labels: tuple[int, ...]  # the new label of each old one

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        record = self.records[index]
        return {**record, "label": self.new_label(record["label"])}

    def new_label(self, old: Any) -> int:
        """Return the new label; -1, which is refused when the example is read, for one that is no class."""
        return self.labels[old] if 0 <= old < len(self.labels) else -1

    def locate(self, index: int) -> str:
        return str(self.records.locate(index))


def open_split(
    dataset: str,
    split: str,
    views: Views = Views(),  # noqa: B008 (Views is immutable)
    *,
    data_dir: str,
    class_split: str = "train",
    channels: int = 3,
) -> Split:
    """Open one split of a data set; prepare the data set first if that needs no TensorFlow.

    Args:
      dataset: name of a TFDS data set, or a directory of a TFDS data set or of images as SPLIT/CLASS/IMAGE.
      split: name of the split, or a slice in TFDS's notation, such as `train[:90%]`.
      views: test view and training view of the images.
      data_dir: TFDS's data directory.
      class_split: split whose folders define the classes, for a directory of images.
      channels: channels of the images of such a directory: 3 for RGB, 1 for gray.

    Raises:
      UserError: if the data set or the split is missing, empty, or not in array_record format.
    """
    directory = os.path.expanduser(dataset)
    if catalog.is_directory(dataset) and not os.path.exists(os.path.join(directory, catalog.INFO)):
        return _open_folder(dataset, split, views, class_split, channels)
    data_dir = os.path.expanduser(data_dir)
    if dataset in catalog.NAMES and "://" not in data_dir:  # a bucket is only read
        catalog.prepare(dataset, data_dir)
    builder = catalog.open_prepared(dataset, data_dir)
    splits = builder.info.splits
    try:
        empty = splits[split].num_examples <= 0
    except (KeyError, ValueError):  # no such split, or no such part of a split
        empty = True
    if empty:
        found = ", ".join(f"{name} ({s.num_examples})" for name, s in splits.items())
        problem = f"split {split!r} of {builder.info.full_name} is missing or empty"
        raise UserError(f"{problem}; found {found}{remedy(split, list(splits))}")
    features = builder.info.features
    labels = label_kind(features)
    if "image" not in features or labels is None:
        raise UserError(
            f"{builder.info.full_name} has {', '.join(sorted(features))}; expected `image` and `label`: one of several "
            "classes, a Sequence of them, or numbers (K,)"
        )
    tfds = require("tensorflow_datasets", "train")
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return Split(
        name=f"{dataset}/{split}",
        records=ArrayRecords(source, splits[split].file_instructions),
        num_classes=labels[1],
        channels=features["image"].shape[-1],
        views=views,
        class_names=_label_names(features["label"], builder.data_dir),
        label_kind=labels[0],
    )


def _open_folder(dataset: str, split: str, views: Views, class_split: str, channels: int) -> Split:
    """Return a split of a directory of images; arguments and errors are those of `open_split`."""
    directory = os.path.expanduser(dataset)
    if versions := catalog.versions(directory):
        raise UserError(f"{dataset} holds data sets of TFDS; choose the directory of one: {', '.join(versions)}")
    folder = FolderRecords(directory, split, class_split)
    for line in folder.notes:
        _note_once(line)
    return Split(f"{dataset}/{split}", folder, len(folder.classes), channels, views, tuple(folder.classes))


def _label_names(label: Any, directory: Any) -> tuple[str, ...]:
    """Return the class names of TFDS's label, one class or several; () if the data set has none.

    For a label without names TFDS gives the numbers.
    """
    if hasattr(label, "get_names_filepath"):
        return tuple(label.names) if label.get_names_filepath(directory, "label").exists() else ()
    names = tuple(getattr(getattr(label, "feature", None), "names", ()))
    return () if names == tuple(map(str, range(len(names)))) else names
