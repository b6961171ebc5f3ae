"""TFDS data sets in TFRecord format, rewritten as array_record: the bytes of each record stay the same.

Source of the format: https://www.tensorflow.org/tutorials/load_data/tfrecord
"""

import os
import struct
from collections.abc import Iterator
from typing import Any

from vgg_jax.data.prepare.catalog import open_builder
from vgg_jax.data.prepare.shards import Shard, write_once
from vgg_jax.errors import UserError, require


def convert(name: str, source_dir: str, data_dir: str) -> None:
    """Write a data set in array_record format into `data_dir`, unless it exists.

    Args:
      name: TFDS's name of the data set.
      source_dir: TFDS's data directory with the data set in TFRecord format.
      data_dir: another data directory.

    Raises:
      UserError: if `source_dir` has no such data set in TFRecord format, if a record is damaged, or if `data_dir`
        cannot be written.
    """
    tfds = require("tensorflow_datasets", "train")
    builder = open_builder(name, source_dir)
    file_format = builder.info.file_format.value if builder.is_prepared() else "none"
    if file_format != "tfrecord":
        raise UserError(
            f"{builder.data_dir} has data in the format {file_format}; expected tfrecord; change --from-tfrecord"
        )
    target = os.path.join(data_dir, os.path.relpath(os.path.realpath(builder.data_dir), os.path.realpath(source_dir)))
    if os.path.realpath(target) == os.path.realpath(builder.data_dir):
        raise UserError(
            f"--data-dir is {data_dir}, which has the TFRecord data; expected another directory; change --data-dir"
        )

    def shard(split: str, path: str) -> Shard:
        return Shard(split, lambda: read_records(path))

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
        splits = builder.info.splits.values()
        return info, [shard(split.name, os.fspath(path)) for split in splits for path in split.filepaths]

    write_once(target, contents)


def read_records(path: str) -> Iterator[bytes]:
    """Yield the records of a TFRecord file, each checked against its CRC.

    Raises:
      UserError: if a record is damaged or cut short; the message has the file and the byte.
    """
    crc32c = require("google_crc32c", "train")

    def masked_crc(data: bytes) -> int:
        crc = int(crc32c.value(data))
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    with open(path, "rb") as file:
        while header := file.read(12):
            offset = file.tell() - len(header)
            try:
                length, length_crc = struct.unpack("<QI", header)
                intact = masked_crc(header[:8]) == length_crc
                data = file.read(length) if intact else b""
                intact = intact and struct.unpack("<I", file.read(4))[0] == masked_crc(data)
            except struct.error:
                intact = False
            if not intact:
                raise UserError(
                    f"{path} is damaged or cut short: the record at byte {offset} fails its checksum; "
                    "copy the file again"
                )
            yield data
