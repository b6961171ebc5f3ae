"""Lists of image files: which files of a folder are images, and which are skipped and why."""

import collections
import functools
import os
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import PIL.Image

from vgg_jax.console import note
from vgg_jax.data.image_files import register_heif
from vgg_jax.errors import UserError

Path: TypeAlias = str | os.PathLike[str]
Image: TypeAlias = Path | PIL.Image.Image | np.ndarray

# Formats that Pillow recognizes but cannot decode by itself.
UNDECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
HEIF = (".heic", ".heif", ".hif")
LITTER = ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin")  # beside hidden files


class Skipped:
    """The files that a listing skipped: how many of each kind, and the first of each."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = collections.defaultdict(list)

    def add(self, kind: str, path: str) -> None:
        """Count a file of a kind, such as ".txt" or "dangling link{s}"."""
        self._found[kind].append(path)

    def __bool__(self) -> bool:
        return bool(self._found)

    def __str__(self) -> str:
        number = sum(map(len, self._found.values()))
        kinds = []
        for kind, paths in sorted(self._found.items()):
            several = len(paths) > 1
            kinds.append(f"{len(paths)} {kind.format(s='s' * several)} ({paths[0]}{', ...' * several})")
        heif = "; install pillow-heif to read HEIC" if self._found.keys() & set(HEIF) else ""
        return f"skipped {number} file{'s' if number > 1 else ''}: {', '.join(kinds)}{heif}"


@functools.cache
def suffixes() -> frozenset[str]:
    """Return the suffixes of the files that Pillow can decode here, in lower case; among them all of torchvision's."""
    register_heif()
    PIL.Image.init()
    found = PIL.Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in found if name in PIL.Image.OPEN and name not in UNDECODED)


def normal(name: str) -> str:
    """Return a file's name in Unicode's form NFC; macOS writes NFD."""
    return unicodedata.normalize("NFC", name)


def is_litter(name: str) -> bool:
    """Return whether a file or a folder is hidden, or a by-product of a system."""
    return name.startswith(".") or name.lower() in LITTER


def list_images(root: str, skipped: Skipped) -> list[str]:
    """Return the paths of the images in a folder and in its subfolders, in the order of their normalized names.

    Symbolic links are followed, except one to a folder that contains it.

    Args:
      root: the folder.
      skipped: receives the other files.

    Raises:
      UserError: if a folder cannot be read.
    """
    return sorted(_walk(root, root, (), skipped), key=lambda path: (normal(path), path))


def _walk(directory: str, root: str, above: tuple[str, ...], skipped: Skipped) -> Iterator[str]:
    above = (*above, os.path.realpath(directory))
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}; change its permissions") from None
    for entry in entries:
        suffix = os.path.splitext(entry.name)[1].lower()
        name = os.path.join(os.path.relpath(directory, os.path.dirname(root)), entry.name)
        if is_litter(entry.name):
            skipped.add("hidden or system file{s}", name)
        elif entry.is_dir():
            real = os.path.realpath(entry.path)
            if real in above or (above[-1] + os.sep).startswith(real + os.sep):
                skipped.add("link{s} to a folder above", name)
            else:
                yield from _walk(entry.path, root, above, skipped)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            skipped.add("dangling link{s}", name)
        elif not entry.is_file():
            skipped.add("special file{s}", name)
        elif suffix in suffixes():
            yield entry.path
        else:
            skipped.add(suffix.replace("{", "").replace("}", "") or "file{s} without a suffix", name)


def has_image(directory: str) -> bool:
    """Return whether a folder itself has an image, not only its subfolders."""
    with os.scandir(directory) as entries:
        files = [entry.name for entry in entries if not is_litter(entry.name) and not entry.is_dir()]
    return any(os.path.splitext(name)[1].lower() in suffixes() for name in files)


def skip_outside_folders(directory: str, skipped: Skipped) -> None:
    """Count the files beside the folders of classes, and the folders that are no classes."""
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if is_litter(entry.name):
            skipped.add("hidden or system file{s}", entry.name)
        elif not entry.is_dir():
            skipped.add("file{s} outside the class folders", entry.name)


def shortened(names: Sequence[str], most: int = 10) -> str:
    """Return the names, at most ten of them, separated by commas."""
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def find_images(images: Image | Sequence[Image]) -> list[tuple[str, Image]]:
    """Return a name for each image and the image: a path, or what was given if it is in memory.

    Folders are replaced by the image files in them and in their subfolders. One line for each folder counts the files
    that are skipped.

    Args:
      images: as for `Network.predict`.

    Raises:
      UserError: if a folder has no images.
    """
    if isinstance(images, str | os.PathLike | PIL.Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4):
        images = [images]
    found: list[tuple[str, Image]] = []
    for image in images:
        if not isinstance(image, str | os.PathLike):
            found.append((f"image {len(found)}", image))
            continue
        path = os.fspath(image)
        files = [path]
        if os.path.isdir(path):
            skipped = Skipped()
            files = list_images(path, skipped)
            if not files:
                reason = f"; {skipped}" if skipped else ""
                raise UserError(
                    f"{path} is a folder without images; expected files such as .jpg, .png or .webp{reason}"
                )
            if skipped:
                note(f"{path}: {skipped}")
        found += [(file, file) for file in files]
    return found
