"""Writing a TFDS data set in array_record format without TensorFlow: shard by shard, complete or not at all."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from filelock import FileLock, Timeout

from vgg_jax.console import log, progress
from vgg_jax.errors import UserError, first_line, require


@dataclass(frozen=True)
class Shard:
    """One file of a data set that is being prepared."""

    split: str
    records: Callable[[], Iterable[bytes]]  # the examples as `info.features.serialize_example` encodes them


def write_once(target: str, contents: Callable[[], tuple[Any, Sequence[Shard]]]) -> None:
    """Write a data set, unless it exists.

    A finished shard stays if the process ends before the last shard, and the next call resumes after it. `target`
    appears when all shards are complete. If several processes call this function at once, one writes and the others
    wait.

    Args:
      target: directory of the data set, DATA_DIR/NAME/VERSION.
      contents: function that returns TFDS's `DatasetInfo` and all shards, those of a split in order. It is called only
        if the data set is missing.

    Raises:
      UserError: if `target` cannot be written.
    """
    target = os.path.abspath(target)
    if os.path.isdir(target):
        return
    parent, version = os.path.split(target)
    with _writing(target):
        os.makedirs(parent, exist_ok=True)
        lock = _acquire(os.path.join(parent, f".{version}.lock"), target)
    with lock:
        if os.path.isdir(target):
            return
        staging = os.path.join(parent, f".{version}.preparing")
        with _writing(target):
            os.makedirs(staging, exist_ok=True)
        _write(*contents(), staging, target)
        with _writing(target):
            os.rename(staging, target)


@contextlib.contextmanager
def _writing(target: str) -> Iterator[None]:
    """Raise UserError with the remedy if the body cannot write."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
        raise UserError(
            f"cannot write {target}: {first_line(error)}; free disk space, or choose another directory with "
            "--config.data.data_dir (or TFDS_DATA_DIR)"
        ) from None


def _acquire(path: str, target: str) -> contextlib.AbstractContextManager[Any]:
    """Return the lock of `target`; wait if another process holds it."""
    lock = FileLock(path)  # the system releases it when its holder dies
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        log(f"waiting for another process that prepares {target}")
        return lock.acquire()


def _write(info: Any, shards: Sequence[Shard], staging: str, target: str) -> None:
    """Write the missing shards and the metadata of a data set into the directory `staging`."""
    tfds = require("tensorflow_datasets", "train")
    by_split: dict[str, list[Shard]] = {}
    for shard in shards:
        by_split.setdefault(shard.split, []).append(shard)
    templates = {
        name: tfds.core.ShardedFileTemplate(
            dataset_name=info.name, data_dir=staging, split=name, filetype_suffix="array_record"
        )
        for name in by_split
    }
    paths = {
        name: [os.path.join(staging, path.name) for path in templates[name].sharded_filepaths(len(of_split))]
        for name, of_split in by_split.items()
    }
    jobs = [job for name, of_split in by_split.items() for job in zip(of_split, paths[name], strict=True)]
    for shard, path in progress(jobs, f"preparing {info.name}", "shards"):
        if not os.path.exists(path):
            _write_shard(path, shard.records(), target)
    splits = [
        tfds.core.SplitInfo(
            name,
            [_count_records(path) for path in of_split],
            sum(os.path.getsize(path) for path in of_split),
            filename_template=templates[name],
        )
        for name, of_split in paths.items()
    ]
    expected = {os.path.basename(path) for _, path in jobs}
    with _writing(target):
        for leftover in set(os.listdir(staging)) - expected:  # unfinished shards, and shards of another number
            os.remove(os.path.join(staging, leftover))
        info.set_file_format("array_record", override=True)  # replaces the format that TFDS itself would write
        info.set_splits(tfds.core.splits.SplitDict(splits))
        info.write_to_directory(staging)


def _write_shard(path: str, records: Iterable[bytes], target: str) -> None:
    """Write the file at `path`, which appears when it is complete."""
    array_record = require("array_record.python.array_record_module", "train")
    unfinished = path + ".unfinished"
    with _writing(target):
        writer = array_record.ArrayRecordWriter(unfinished, "group_size:1")
    try:
        for record in records:
            with _writing(target):
                writer.write(record)
    except OSError as error:
        raise UserError(f"cannot read the source of {os.path.basename(path)}: {error}") from None
    with _writing(target):
        writer.close()
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.rename(unfinished, path)


def _count_records(path: str) -> int:
    array_record = require("array_record.python.array_record_module", "train")
    reader = array_record.ArrayRecordReader(path)
    try:
        return int(reader.num_records())
    finally:
        reader.close()


def serialize(info: Any, examples: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    """Yield the examples as records; an image may be a PIL image, an open file or a path."""
    return (info.features.serialize_example(example) for example in examples)
