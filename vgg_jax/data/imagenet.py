"""ImageNet (ILSVRC 2012) from its two archives, as TFDS's `imagenet2012` 5.1.0, without TensorFlow.

Source: O. Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015.
"""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any

import PIL.Image

from vgg_jax.data.shards import Shard, serialize, write_once
from vgg_jax.errors import UserError

NAME = "imagenet2012"
TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
VALIDATION_LABELS = "datasets/imagenet2012/validation_labels.txt"  # of TFDS, in the order of the images' names
CLASSES_PER_SHARD = 10  # a reader keeps each shard open, and systems allow a process few hundred files
VALIDATION_SHARD = 5000  # images


def prepare(data_dir: str, manual_dir: str | None = None) -> None:
    """Writes `data_dir`/imagenet2012/5.1.0 once, in array_record format; does nothing where it is.

    The archives are streamed, never unpacked: a shard for ten classes, or 5,000 validation images. Images
    are stored as they are, but for those that are not JPEGs of one or three channels, which become RGB JPEGs: in the
    authors' archives 22 in CMYK and a PNG.

    Args:
      data_dir: TFDS's data directory.
      manual_dir: where the two archives are; by default `data_dir`/downloads/manual.

    Raises:
      UserError: where an archive is missing, cut short or of other contents, or `data_dir` cannot be written.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(NAME, data_dir=data_dir, try_gcs=False)
    manual_dir = manual_dir or os.path.join(data_dir, "downloads", "manual")
    paths = [os.path.join(manual_dir, name) for name in (TRAIN_TAR, VALIDATION_TAR)]

    def contents() -> tuple[Any, list[Shard]]:
        if missing := [path for path in paths if not os.path.exists(path)]:
            raise UserError(
                f"{NAME} is not in {data_dir} (set --config.data.data_dir or TFDS_DATA_DIR to where it is), and to "
                f"prepare it {' and '.join(missing)} is missing: fetch it from https://image-net.org/download-images "
                f"and place it there, or say where it is: python -m vgg_jax.prepare {NAME} --manual-dir DIR"
            )
        train_path, validation_path = paths
        synsets = builder.info.features["label"].names
        with open(os.fspath(tfds.core.tfds_path(VALIDATION_LABELS))) as file:
            labels = file.read().split()

        classes = {member.name.removesuffix(".tar"): member for member in _members(train_path)}
        if classes.keys() != set(synsets):
            absent, strange = sorted(set(synsets) - classes.keys()), sorted(classes.keys() - set(synsets))
            raise UserError(
                f"{train_path} has {len(classes)} members; expected one .tar for each of {len(synsets)} classes: "
                f"missing {', '.join(absent[:5]) or 'none'}, unknown {', '.join(strange[:5]) or 'none'}"
            )
        images = sorted(_members(validation_path), key=lambda member: member.name)

        def train_examples(chosen: list[str]) -> Iterator[dict[str, Any]]:
            with tarfile.open(train_path, "r:") as tar:
                for synset in chosen:
                    file = tar.extractfile(classes[synset])
                    assert file is not None  # for a file
                    for member in _members(f"{train_path}, {synset}.tar", file):
                        file.seek(member.offset_data)
                        yield _example(file.read(member.size), member.name, synset)

        def validation_examples(chosen: list[tarfile.TarInfo]) -> Iterator[dict[str, Any]]:
            with open(validation_path, "rb") as file:
                for member in chosen:
                    number = re.fullmatch(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG", member.name)
                    if number is None or not 1 <= int(number[1]) <= len(labels):
                        raise UserError(
                            f"{validation_path} has {member.name}; expected ILSVRC2012_val_00000001.JPEG up to "
                            f"ILSVRC2012_val_{len(labels):08d}.JPEG"
                        )
                    file.seek(member.offset_data)
                    yield _example(file.read(member.size), member.name, labels[int(number[1]) - 1])

        def shards(split: str, examples: Any, items: list[Any], size: int) -> list[Shard]:
            parts = [items[i : i + size] for i in range(0, len(items), size)]
            return [Shard(split, lambda part=part: serialize(builder.info, examples(part))) for part in parts]  # type: ignore[misc]

        return builder.info, [
            *shards("train", train_examples, synsets, CLASSES_PER_SHARD),
            *shards("validation", validation_examples, images, VALIDATION_SHARD),
        ]

    write_once(str(builder.data_dir), contents)


def _members(name: str, file: IO[bytes] | None = None) -> list[tarfile.TarInfo]:
    """The files of the archive at the path `name`, or of that name in `file`, found by their headers alone."""
    if file is None:
        with open(name, "rb") as opened:
            return _members(name, opened)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = [member for member in tar if member.isfile()]
            end = tar.offset
    except tarfile.TarError as error:
        raise UserError(f"{name} is not a whole tar archive: {error}; fetch it again") from None
    file.seek(end)  # where tarfile has stopped, be it the file's end or a header that is none
    if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
        raise UserError(f"{name} is damaged or cut short at byte {end}: no end-of-archive mark; fetch it again")
    return members


def _example(data: bytes, name: str, synset: str) -> dict[str, Any]:
    return {"image": _repaired(data, name), "label": synset, "file_name": name}


def _repaired(data: bytes, name: str) -> io.BytesIO:
    """The file itself where it is a JPEG of one or three channels, else an RGB JPEG of the same image."""
    try:
        image = PIL.Image.open(io.BytesIO(data))
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            return io.BytesIO(data)
        jpeg = io.BytesIO()
        image.convert("RGB").save(jpeg, "JPEG", quality=100, subsampling=0)
    except OSError as error:
        raise UserError(f"{name} is not an image: {error}; fetch the archive again") from None
    return io.BytesIO(jpeg.getvalue())
