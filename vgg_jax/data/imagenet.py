"""ImageNet (ILSVRC 2012) from its two archives, as TFDS's `imagenet2012` 5.1.0, without TensorFlow.

Source: O. Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from typing import Any

import PIL.Image

from vgg_jax.data.shards import Shard, serialize, write_once
from vgg_jax.errors import UserError

NAME = "imagenet2012"
TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
VALIDATION_LABELS = "datasets/imagenet2012/validation_labels.txt"  # of TFDS, in the order of the images' names
VALIDATION_SHARD = 1000  # images


def prepare(data_dir: str, manual_dir: str | None = None) -> None:
    """Writes `data_dir`/imagenet2012/5.1.0 once, in array_record format; does nothing where it is.

    The archives are streamed, never unpacked: a shard for each class and for each thousand validation images. Images
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
        if len(images) > len(labels):
            raise UserError(f"{validation_path} has {len(images)} images; expected at most {len(labels)}")
        label_of = dict(zip((member.name for member in images), labels, strict=False))

        def train_examples(synset: str) -> Iterator[dict[str, Any]]:
            with tarfile.open(train_path, "r:") as tar, tarfile.open(fileobj=tar.extractfile(classes[synset])) as inner:
                for member in inner:
                    yield _example(inner, member, synset)

        def validation_examples(first: int) -> Iterator[dict[str, Any]]:
            with tarfile.open(validation_path, "r:") as tar:
                for member in images[first : first + VALIDATION_SHARD]:
                    yield _example(tar, member, label_of[member.name])

        train = [
            Shard("train", lambda synset=synset: serialize(builder.info, train_examples(synset)))  # type: ignore[misc]
            for synset in synsets
        ]
        validation = [
            Shard("validation", lambda first=first: serialize(builder.info, validation_examples(first)))  # type: ignore[misc]
            for first in range(0, len(images), VALIDATION_SHARD)
        ]
        return builder.info, train + validation

    write_once(str(builder.data_dir), contents)


def _members(path: str) -> list[tarfile.TarInfo]:
    """The files of an archive, found by their headers alone."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for member in tar if member.isfile()]
            end = tar.offset
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a whole tar archive: {error}; fetch it again") from None
    if end >= os.path.getsize(path):  # tarfile takes any end between two files for the end
        raise UserError(f"{path} is cut short: it has no end-of-archive mark; fetch it again")
    return members


def _example(tar: tarfile.TarFile, member: tarfile.TarInfo, synset: str) -> dict[str, Any]:
    file = tar.extractfile(member)
    assert file is not None  # for a file
    return {"image": _repaired(file.read(), member.name), "label": synset, "file_name": member.name}


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
