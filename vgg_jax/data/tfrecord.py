"""TFDS data sets in TFRecord format, rewritten as array_record: the records stay the same, byte for byte.

Source of the format: https://www.tensorflow.org/tutorials/load_data/tfrecord
"""

import os
import struct
from collections.abc import Iterator
from typing import Any

from vgg_jax.data.preparation import open_builder
from vgg_jax.data.shards import Shard, write_once
from vgg_jax.errors import UserError


def convert(name: str, source_dir: str, data_dir: str) -> None:
    """Writes the data set `name` of the TFDS directory `source_dir` into `data_dir` in array_record format, once.

    Raises:
      UserError: where the data set is not there in TFRecord format, a record is damaged, or `data_dir` cannot be
        written.
    """
    import tensorflow_datasets as tfds

    builder = open_builder(name, source_dir)
    file_format = builder.info.file_format.value if builder.is_prepared() else "none"
    if file_format != "tfrecord":
        raise UserError(f"{builder.data_dir} has data in the format {file_format}; expected tfrecord")
    target = os.path.join(data_dir, os.path.relpath(os.path.realpath(builder.data_dir), os.path.realpath(source_dir)))
    if os.path.realpath(target) == os.path.realpath(builder.data_dir):
        raise UserError(f"--data-dir is {data_dir}, where the TFRecord data are; expected another directory")

    def contents() -> tuple[Any, list[Shard]]:
        info = tfds.core.DatasetInfo(
            builder=tfds.core.DatasetIdentity(
                name=name, version=builder.version, data_dir=target, module_name=__name__
            ),
            features=builder.info.features,
            description=builder.info.description,
            supervised_keys=builder.info.supervised_keys,
            homepage=builder.info.homepage,
            citation=builder.info.citation,
        )
        return info, [
            Shard(split.name, lambda path=path: read_records(os.fspath(path)))  # type: ignore[misc]
            for split in builder.info.splits.values()
            for path in split.filepaths
        ]

    write_once(target, contents)


def read_records(path: str) -> Iterator[bytes]:
    """The records of a TFRecord file, each checked against its CRC.

    Raises:
      UserError: naming the file and the byte where a record is damaged or cut short.
    """
    import google_crc32c

    def masked_crc(data: bytes) -> int:
        crc = google_crc32c.value(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    with open(path, "rb") as file:
        while header := file.read(12):
            offset = file.tell() - len(header)
            try:
                length, length_crc = struct.unpack("<QI", header)
                whole = masked_crc(header[:8]) == length_crc
                data = file.read(length) if whole else b""
                whole = whole and struct.unpack("<I", file.read(4))[0] == masked_crc(data)
            except struct.error:
                whole = False
            if not whole:
                raise UserError(f"{path} is damaged or cut short: the record at byte {offset} fails its checksum")
            yield data
