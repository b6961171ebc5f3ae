"""ImageNet (ILSVRC 2012) from its two archives, as TFDS's `imagenet2012` 5.1.0, without TensorFlow.

Source: O. Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015.
"""

import io
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import PIL.Image

from vgg_jax.data.prepare.shards import Shard, serialize, write_once
from vgg_jax.errors import UserError, require

NAME = "imagenet2012"
TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
VALIDATION_LABELS = "datasets/imagenet2012/validation_labels.txt"  # part of TFDS, in the order of the images' names
CLASSES_PER_SHARD = 10  # a reader keeps each shard open, and a process may open only some hundred files
VALIDATION_SHARD = 5000  # images

Item = TypeVar("Item")


def prepare(data_dir: str, manual_dir: str | None = None) -> None:
    """Write `data_dir`/imagenet2012/5.1.0 in array_record format, unless it exists.

    The archives are streamed, never unpacked. A shard holds ten classes, or 5,000 validation images. JPEGs of one or
    three channels are stored unchanged. All other images become RGB JPEGs: 22 in CMYK and one PNG in the authors'
    archives.

    Args:
      data_dir: TFDS's data directory.
      manual_dir: directory of the two archives; by default `data_dir`/downloads/manual.

    Raises:
      UserError: if an archive is missing, cut short or has other contents, or if `data_dir` cannot be written.
    """
    tfds = require("tensorflow_datasets", "train")
    builder = tfds.builder(NAME, data_dir=data_dir, try_gcs=False)
    manual_dir = manual_dir or os.path.join(data_dir, "downloads", "manual")
    paths = [os.path.join(manual_dir, name) for name in (TRAIN_TAR, VALIDATION_TAR)]

    def contents() -> tuple[Any, list[Shard]]:
        if missing := [path for path in paths if not os.path.exists(path)]:
            raise UserError(
                f"{NAME} is not in {data_dir}, and {' and '.join(missing)} is missing; set --config.data.data_dir (or "
                f"TFDS_DATA_DIR) to the directory that has {NAME}, or download the archives from "
                "https://image-net.org/download-images and place them there, or in another directory: "
                f"python -m vgg_jax prepare {NAME} --manual-dir DIR"
            )
        with open(os.fspath(tfds.core.tfds_path(VALIDATION_LABELS))) as file:
            labels = file.read().split()
        train_path, validation_path = paths
        return builder.info, [
            *_train_shards(builder.info, train_path),
            *_validation_shards(builder.info, validation_path, labels),
        ]

    write_once(str(builder.data_dir), contents)


def _train_shards(info: Any, path: str) -> list[Shard]:
    """Return the training shards of the archive at `path`, which has one .tar for each class.

    Raises:
      UserError: if the archive is damaged, or if its classes are not ImageNet's.
    """
    synsets = info.features["label"].names
    classes = {member.name.removesuffix(".tar"): member for member in _members(path)}
    if classes.keys() != set(synsets):
        absent, unknown = sorted(set(synsets) - classes.keys()), sorted(classes.keys() - set(synsets))
        raise UserError(
            f"{path} has {len(classes)} members; expected one .tar for each of {len(synsets)} classes: "
            f"missing {', '.join(absent[:5]) or 'none'}, unknown {', '.join(unknown[:5]) or 'none'}; "
            "download the archive again"
        )

    def examples(chosen: Sequence[str]) -> Iterator[dict[str, Any]]:
        with tarfile.open(path, "r:") as tar:
            for synset in chosen:
                file = tar.extractfile(classes[synset])
                assert isinstance(file, io.BufferedReader)  # true for each regular file
                for member in _members(f"{path}, {synset}.tar", file):
                    file.seek(member.offset_data)
                    yield _example(file.read(member.size), member.name, synset)

    return _shards(info, "train", examples, synsets, CLASSES_PER_SHARD)


def _validation_shards(info: Any, path: str, labels: Sequence[str]) -> list[Shard]:
    """Return the validation shards of the archive at `path`; `labels` has the synset of each image, in order.

    Raises:
      UserError: if the archive is damaged.
    """

    def examples(chosen: Sequence[tarfile.TarInfo]) -> Iterator[dict[str, Any]]:
        with open(path, "rb") as file:
            for member in chosen:
                number = re.fullmatch(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG", member.name)
                if number is None or not 1 <= int(number[1]) <= len(labels):
                    raise UserError(
                        f"{path} has {member.name}; expected ILSVRC2012_val_00000001.JPEG to "
                        f"ILSVRC2012_val_{len(labels):08d}.JPEG; download the archive again"
                    )
                file.seek(member.offset_data)
                yield _example(file.read(member.size), member.name, labels[int(number[1]) - 1])

    images = sorted(_members(path), key=lambda member: member.name)
    return _shards(info, "validation", examples, images, VALIDATION_SHARD)


def _shards(
    info: Any,
    split: str,
    examples: Callable[[Sequence[Item]], Iterable[dict[str, Any]]],
    items: Sequence[Item],
    size: int,
) -> list[Shard]:
    """Return the shards of a split, each with the examples of `size` items."""

    def shard(part: Sequence[Item]) -> Shard:
        return Shard(split, lambda: serialize(info, examples(part)))

    return [shard(items[i : i + size]) for i in range(0, len(items), size)]


def _members(name: str, file: io.BufferedReader | None = None) -> list[tarfile.TarInfo]:
    """Return the files of an archive, found by their headers alone.

    Args:
      name: path of the archive, or its name for messages.
      file: the opened archive; by default the file at `name`.

    Raises:
      UserError: if the archive is damaged or cut short.
    """
    if file is None:
        with open(name, "rb") as opened:
            return _members(name, opened)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = [member for member in tar if member.isfile()]
            end = tar.offset
    except tarfile.TarError as error:
        raise UserError(f"{name} is not a complete tar archive: {error}; download it again") from None
    file.seek(end)  # tarfile stops here, at the end-of-archive mark, at the end of the file or at an invalid header
    if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
        raise UserError(f"{name} is damaged or cut short at byte {end}: no end-of-archive mark; download it again")
    return members


def _example(data: bytes, name: str, synset: str) -> dict[str, Any]:
    return {"image": _repaired(data, name), "label": synset, "file_name": name}


def _repaired(data: bytes, name: str) -> io.BytesIO:
    """Return the file itself if it is a JPEG of one or three channels, else an RGB JPEG of the same image."""
    try:
        image = PIL.Image.open(io.BytesIO(data))
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            return io.BytesIO(data)
        jpeg = io.BytesIO()
        image.convert("RGB").save(jpeg, "JPEG", quality=100, subsampling=0)
    except OSError as error:
        raise UserError(f"{name} is not an image: {error}; download the archive again") from None
    return io.BytesIO(jpeg.getvalue())
