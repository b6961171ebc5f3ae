"""TFRecord data, rewritten as array_record."""

import struct

from tests.conftest import raises_user_error, write_cifar10
from tests.data.archives import assert_same_records, records
from tests.data.common import open_cifar10
from vgg_jax.cli import prepare
from vgg_jax.data.prepare import tfrecord


def test_tfrecord_data_are_rewritten_record_by_record(tmp_path):
    """The test writes the TFRecord files itself, from the description of the format, without TensorFlow."""
    import google_crc32c
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

    def masked_crc(data):
        crc = google_crc32c.value(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    old, new = tmp_path / "old", tmp_path / "new"
    write_cifar10(str(old), num_train=20, num_test=10)
    expected = {split: records(old, "cifar10", split) for split in ("train", "test")}
    directory = old / "cifar10" / "3.0.2"
    for path in directory.glob("*.array_record*"):
        reader = ArrayRecordReader(str(path))
        with open(str(path).replace("array_record", "tfrecord"), "wb") as file:
            for record in reader.read_all():
                length = struct.pack("<Q", len(record))
                file.write(length + masked_crc(length) + record + masked_crc(record))
        reader.close()
        path.unlink()
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    assert tfds.builder("cifar10", data_dir=str(old)).info.file_format.value == "tfrecord"

    with raises_user_error("is in tfrecord format; expected array_record", f"cifar10 --from-tfrecord {old}"):
        open_cifar10(old)
    assert prepare.main(["cifar10", "--from-tfrecord", str(old), "--data-dir", str(new)]) == 0
    for split, originals in expected.items():
        assert_same_records(records(new, "cifar10", split), originals)
    with raises_user_error("which has the TFRecord data; expected another directory"):
        tfrecord.convert("cifar10", str(old), str(old))

    (path,) = directory.glob("*train.tfrecord*")
    data = bytearray(path.read_bytes())
    for damaged in (data[:-5], data[:200] + bytes([data[200] ^ 1]) + data[201:]):
        path.write_bytes(damaged)
        with raises_user_error(f"{path} is damaged or cut short: the record at byte"):
            list(tfrecord.read_records(str(path)))
