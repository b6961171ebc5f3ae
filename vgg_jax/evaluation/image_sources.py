"""The images whose features are extracted: files, a folder, or a split of a data set."""

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import PIL.Image

from vgg_jax.data import image_files
from vgg_jax.data.dataset import CorruptImageError, Split, open_split
from vgg_jax.data.image_folder import FolderRecords, split_names
from vgg_jax.data.listing import find_images, has_image
from vgg_jax.data.prepare import catalog
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.errors import UserError


@runtime_checkable
class ImageSource(Protocol):
    """Images with names, and with labels if there are any."""

    name: str  # for messages
    num_classes: int
    channels: int
    label_shape: tuple[int, ...]
    labeled: bool
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def pixels(self, index: int) -> tuple[np.ndarray, Any]:
        """Return an image, (H, W, C) uint8, and its label; raise CorruptImageError if it cannot be decoded."""
        ...

    def image(self, index: int) -> tuple[PIL.Image.Image, Any]:
        """Return an image and its label."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image, without decoding it if possible."""
        ...

    def image_name(self, index: int) -> str:
        """Return the name of an image in the output."""
        ...

    def fingerprint(self) -> str:
        """Return a hash that changes if an image is added, removed, renamed or modified."""
        ...


class FileImages:
    """Image files without labels."""

    num_classes: int = 0
    label_shape: tuple[int, ...] = ()
    labeled: bool = False
    class_names: tuple[str, ...] = ()

    def __init__(self, paths: Sequence[str], root: str, preprocessing: Preprocessing) -> None:
        """Take the files at `paths`; they are named relative to the folder `root`, if it is not empty.

        Args:
          paths: the files.
          root: their folder, or "".
          preprocessing: the channels and the EXIF rule.
        """
        self.name = root or "the images"
        self._paths = list(paths)
        self._names = [os.path.relpath(path, root) if root else path for path in paths]
        self._mode, self._exif = "L" if preprocessing.channel_order == "L" else "RGB", preprocessing.exif
        self.channels = len(preprocessing.mean)

    def __len__(self) -> int:
        return len(self._paths)

    def pixels(self, index: int) -> tuple[np.ndarray, int]:
        """Return an image, (H, W, C) uint8, and 0; raise CorruptImageError as `predict` reports it."""
        path = self._paths[index]
        try:
            with open(path, "rb") as file:
                data = file.read()
            return _decoded(data, self._mode, self._exif), 0
        except image_files.DECODING_ERRORS as error:
            reason = error.strerror or error if isinstance(error, OSError) else error
            raise CorruptImageError(f"{path}: not a readable image: {reason}") from None

    def image(self, index: int) -> tuple[PIL.Image.Image, int]:
        """Return an image and 0."""
        pixels, label = self.pixels(index)
        return PIL.Image.fromarray(pixels[..., 0] if self.channels == 1 else pixels), label

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image."""
        height, width = self.pixels(index)[0].shape[:2]
        return height, width

    def image_name(self, index: int) -> str:
        """Return the path of an image, relative to the folder."""
        return self._names[index]

    def fingerprint(self) -> str:
        """Return a hash of the names, sizes and times of the files."""
        return _files_hash(zip(self._names, self._paths, strict=True))


class SplitImages:
    """The images of a split of a data set, with their labels."""

    labeled: bool = True

    def __init__(self, split: Split) -> None:
        """Take the images of `split`, which has the channels and the EXIF rule of the network."""
        self.split = split
        self.name, self.num_classes, self.channels = split.name, split.num_classes, split.channels
        self.label_shape, self.class_names = split.label_shape, split.class_names

    def __len__(self) -> int:
        return len(self.split)

    def pixels(self, index: int) -> tuple[np.ndarray, Any]:
        """Return an image, (H, W, C) uint8, and its label; raise as `Split.pixels`."""
        return self.split.pixels(index)

    def image(self, index: int) -> tuple[PIL.Image.Image, Any]:
        """Return an image and its label; raise as `Split.image`."""
        return self.split.image(index)

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image; raise as `Split.size`."""
        return self.split.size(index)

    def image_name(self, index: int) -> str:
        """Return the path in the split's folder, or the name that the record has, or its number."""
        records, place = self._source()
        index = int(index) if place is None else int(place[index])
        if isinstance(records, FolderRecords):
            return records.key(index)
        record = records[index]
        name = record.get("file_name", record.get("id", ""))
        return (name.decode() if isinstance(name, bytes) else str(name)) or str(index)

    def fingerprint(self) -> str:
        """Return a hash of the files' names, sizes and times, the selected examples and the classes."""
        records, place = self._source()
        chosen = np.arange(len(records)) if place is None else np.asarray(place, np.int64)
        selection = hashlib.sha256(repr(self.split.class_names).encode() + chosen.tobytes()).hexdigest()
        if isinstance(records, FolderRecords):
            files = [(records.key(int(i)), records.locate(int(i))) for i in chosen]
        else:
            files = [(f"{os.path.basename(f.filename)} {f.skip} {f.take}", f.filename) for f in records.files]
        return _files_hash([*files], selection)

    def _source(self) -> tuple[Any, np.ndarray | None]:
        """Return the records without selections, and the place in them of each example; None: they are the same."""
        records, place = self.split.records, None
        while hasattr(records, "records"):
            indices = getattr(records, "indices", None)
            if indices is not None:
                place = indices if place is None else indices[place]
            records = records.records
        return records, place


def open_source(
    source: str, preprocessing: Preprocessing, split: str | None = None, data_dir: str = ""
) -> FileImages | SplitImages:
    """Return the images at `source`.

    Args:
      source: an image file, a folder of images, a folder CLASS/IMAGE or SPLIT/CLASS/IMAGE, or the name or directory of
        a TFDS data set.
      preprocessing: the channels and the EXIF rule of the network.
      split: the split of a data set. A folder CLASS/IMAGE needs none.
      data_dir: TFDS's data directory.

    Returns:
      The images, decoded when they are read: (H, W, C) uint8. The image files of a folder have no labels. The images of
      a data set, or of a folder of classes, have them.

    Raises:
      UserError: if there is nothing to read, or a data set has splits and none was chosen, or not this one.
    """
    path = os.path.expanduser(source)
    if os.path.isfile(path) or (os.path.isdir(path) and split is None and has_image(path)):
        files = [str(name) for name, _ in find_images(path)]
        return FileImages(files, path if os.path.isdir(path) else os.path.dirname(path) or ".", preprocessing)
    if os.path.isdir(path) and not catalog.is_directory(source):
        source = os.path.join(".", source)  # otherwise it would be the name of a TFDS data set
    if split is None:
        if not os.path.isdir(path):
            kind = "does not exist" if catalog.is_directory(source) else "is no file or folder here"
            raise UserError(
                f"{source} {kind}; expected an image, a folder of images, or a data set of TFDS with its split: "
                "correct the path, or add --split"
            )
        names = [] if os.path.exists(os.path.join(path, catalog.INFO)) else split_names(path)
        if names != ["all"]:
            if not names and not os.path.exists(os.path.join(path, catalog.INFO)):
                find_images(path)  # raises, because the folder has no images
            raise UserError(
                f"{source} is a data set with splits{': ' * bool(names)}{', '.join(names)}; expected one to read: add "
                "--split"
            )
        split = "all"
    # The classes of a folder are numbered by its training split, as the trainer does.
    of_training = os.path.isdir(path) and "train" in split_names(path)
    opened = open_split(source, split, data_dir=data_dir, class_split="train" if of_training else split)
    return SplitImages(opened.decoded_for(preprocessing))


def _decoded(data: bytes, mode: str, exif: bool) -> np.ndarray:
    """Return the pixels of an image file: by simplejpeg if it is installed, else by Pillow, which takes longer."""
    try:
        import simplejpeg  # noqa: F401 - only whether it can be imported
    except ImportError:
        return image_files.to_array(image_files.decode(image_files.open_file(io.BytesIO(data)), mode, exif))
    return image_files.decode_file(data, mode, exif)


def _files_hash(files: Iterator[tuple[str, str]] | Sequence[tuple[str, str]], seed: str = "") -> str:
    """Return the SHA-256 of the names, sizes and modification times of files."""
    total = hashlib.sha256(seed.encode())
    for name, path in files:
        try:
            found = os.stat(path)
            state = f"{found.st_size} {found.st_mtime_ns}"
        except OSError:
            state = "missing"
        total.update(f"{name}\0{state}\n".encode(errors="surrogateescape"))
    return total.hexdigest()
