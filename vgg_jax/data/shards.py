"""Writing a TFDS data set in array_record format, without TensorFlow: shard by shard, and whole or not at all."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from filelock import FileLock, Timeout

from vgg_jax.errors import UserError, first_line
from vgg_jax.reporting import progress, say


@dataclass(frozen=True)
class Shard:
    """One file of a data set to be."""

    split: str
    records: Callable[[], Iterable[bytes]]  # the examples, as `info.features.serialize_example` gives them


def write_once(target: str, contents: Callable[[], tuple[Any, Sequence[Shard]]]) -> None:
    """Writes a data set, unless it is there.

    A shard that is finished stays where the process ends before the last one, and the next call goes on after it.
    `target` appears when all is there. Of several processes that call this at once, one writes and the others wait.

    Args:
      target: the data set's directory, DATA_DIR/NAME/VERSION.
      contents: gives TFDS's `DatasetInfo` and all shards, those of a split in their order; called only where needed.

    Raises:
      UserError: where `target` cannot be written.
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
    try:
        yield
    except (OSError, RuntimeError) as error:  # array_record raises the latter
        raise UserError(
            f"cannot write {target}: {first_line(error)}; make room, or choose another place with "
            "--config.data.data_dir (or TFDS_DATA_DIR)"
        ) from None


def _acquire(path: str, target: str) -> contextlib.AbstractContextManager:
    lock = FileLock(path)  # the system releases it when its holder dies
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        say(f"another process prepares {target}: waiting for it")
        return lock.acquire()


def _write(info: Any, shards: Sequence[Shard], staging: str, target: str) -> None:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.naming import ShardedFileTemplate

    by_split: dict[str, list[Shard]] = {}
    for shard in shards:
        by_split.setdefault(shard.split, []).append(shard)
    templates = {
        name: ShardedFileTemplate(dataset_name=info.name, data_dir=staging, split=name, filetype_suffix="array_record")
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
        for leftover in set(os.listdir(staging)) - expected:  # of other shards, and unfinished ones
            os.remove(os.path.join(staging, leftover))
        info.set_file_format("array_record", override=True)  # of what TFDS would write
        info.set_splits(tfds.core.splits.SplitDict(splits))
        info.write_to_directory(staging)


def _write_shard(path: str, records: Iterable[bytes], target: str) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    unfinished = path + ".unfinished"
    with _writing(target):
        writer = ArrayRecordWriter(unfinished, "group_size:1")
    try:
        for record in records:
            with _writing(target):
                writer.write(record)
    except OSError as error:
        raise UserError(f"cannot read what {os.path.basename(path)} is made of: {error}") from None
    with _writing(target):
        writer.close()
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.rename(unfinished, path)


def _count_records(path: str) -> int:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path)
    try:
        return reader.num_records()
    finally:
        reader.close()


def serialize(info: Any, examples: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    """Examples, their images PIL images, files or the path of one, as records."""
    return (info.features.serialize_example(example) for example in examples)
