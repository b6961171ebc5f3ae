"""Features of images on disk, in rows that are found by the digest of the image's file.

A store is a directory with the rows (`rows.bin`, mapped into memory), their digests (`digests.bin`) and `store.json`,
which says what the rows were computed with. Rows are written before their digests. So a row without a digest is
incomplete, and is computed again.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import filelock
import numpy as np

from vgg_jax.console import Bar, note
from vgg_jax.data.dataset import Split
from vgg_jax.data.labels import Label
from vgg_jax.data.processors import num_processors
from vgg_jax.errors import UserError

DIGEST = 16  # bytes of a digest
READ_AT_ONCE = 256  # images of a task of a thread


class FeatureStore:
    """Rows of features; find them with `find`, read them from `rows`, add to them with `append`."""

    def __init__(self, root: str, facts: Mapping[str, Any], row_shape: Sequence[int], dtype: Any) -> None:
        """Open the store for some facts below `root`, or create it; print what another store of the data differs in.

        Args:
          root: the directory of all stores.
          facts: what the rows depend on besides the images, as JSON values; `data` names the data.
          row_shape: the shape of a row.
          dtype: the dtype of a row.

        Raises:
          UserError: if the directory cannot be written.
        """
        self._shape, self._dtype = tuple(row_shape), np.dtype(dtype)
        self._row_bytes = int(np.prod(self._shape)) * self._dtype.itemsize
        rest = {name: value for name, value in facts.items() if name != "data"}
        root = os.path.abspath(os.path.expanduser(root))
        self.directory = os.path.join(root, hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16])
        self._rows, self._digests = (os.path.join(self.directory, name) for name in ("rows.bin", "digests.bin"))
        try:
            if not os.path.exists(os.path.join(self.directory, "store.json")):
                if line := _difference(root, facts):
                    note(line)
                os.makedirs(self.directory, exist_ok=True)
                _write_json(os.path.join(self.directory, "store.json"), facts)
            for path in (self._rows, self._digests):
                open(path, "ab").close()
            self._load()
        except (OSError, ValueError) as error:
            raise self._cannot_use(error) from None

    def _load(self) -> None:
        """Read the digests of the complete rows, and map the rows into memory."""
        with open(self._digests, "rb") as file:
            found = file.read()
        self.count = min(len(found) // DIGEST, os.path.getsize(self._rows) // self._row_bytes)
        self._places = {found[i * DIGEST : (i + 1) * DIGEST]: i for i in range(self.count)}
        shape = (self.count, *self._shape)
        self.rows = np.memmap(self._rows, self._dtype, "r", 0, shape) if self.count else np.empty(shape, self._dtype)

    def find(self, digests: Sequence[bytes]) -> np.ndarray:
        """Return the row of each digest, (N,) int64; -1 if it is missing."""
        return np.array([self._places.get(digest, -1) for digest in digests], np.int64)

    @contextlib.contextmanager
    def filling(self, count: int) -> Iterator[None]:
        """Lock the store to append `count` rows; `rows` has them at the end.

        Raises:
          UserError: if another process holds the lock, or the disk has too little space.
        """
        os.truncate(self._digests, self.count * DIGEST)
        free = shutil.disk_usage(self.directory).free
        if count * self._row_bytes > free:
            raise UserError(
                f"the features of {count:,} images take {count * self._row_bytes / 2**30:.2f} GiB in {self.directory}, "
                f"which has {free / 2**30:.2f} GiB; free disk space, or choose another --config.features_dir"
            )
        try:
            yield
        except OSError as error:
            raise self._cannot_use(error) from None
        finally:
            self._load()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the store, and read what another process has added.

        Raises:
          UserError: if another process holds the lock.
        """
        lock = filelock.FileLock(os.path.join(self.directory, ".lock"), timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"another process is computing features in {self.directory}; wait until it ends, or choose another "
                "--config.features_dir"
            ) from None
        try:
            self._load()
            yield
        finally:
            lock.release()

    def append(self, digests: Sequence[bytes], rows: np.ndarray) -> None:
        """Write rows (N, ...), then their digests; both are on the disk at the end."""
        for path, offset, data in (
            (self._rows, self.count * self._row_bytes, np.ascontiguousarray(rows, self._dtype).tobytes()),
            (self._digests, self.count * DIGEST, b"".join(digests)),
        ):
            with open(path, "r+b") as file:
                file.seek(offset)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        self.count += len(digests)

    def _cannot_use(self, error: Exception) -> UserError:
        return UserError(f"cannot use {self.directory}: {error}; choose another --config.features_dir")


def read_digests(split: Split) -> tuple[list[bytes], list[Label]]:
    """Return the digest of the file of each example of a split, and its label; this reads all files.

    Raises:
      UserError: if an example cannot be read.
    """

    def read(first: int) -> list[tuple[bytes, Label]]:
        examples = (split.encoded(i) for i in range(first, min(first + READ_AT_ONCE, len(split))))
        return [(hashlib.sha256(data).digest()[:DIGEST], label) for data, label in examples]

    pairs: list[tuple[bytes, Label]] = []
    with Bar(f"checking {split.name}", len(split), "images") as bar, ThreadPoolExecutor(num_processors()) as threads:
        for chunk in threads.map(read, range(0, len(split), READ_AT_ONCE)):
            pairs += chunk
            bar.update(len(chunk))
    return [digest for digest, _ in pairs], [label for _, label in pairs]


def _difference(root: str, facts: Mapping[str, Any]) -> str:
    """Return a line about the store of the same data that differs least; an empty one if there is none."""
    found: list[list[str]] = []
    for name in sorted(os.listdir(root)) if os.path.isdir(root) else []:
        with contextlib.suppress(OSError, ValueError), open(os.path.join(root, name, "store.json")) as file:
            other = json.load(file)
            if other.get("data") == facts["data"]:
                found.append([key for key in facts if json.loads(json.dumps(facts[key])) != other.get(key)])
    if not found:
        return ""
    fields = min(found, key=len)
    return f"the cached features of {facts['data']} are for other {', '.join(fields)}: computing them again"


def _write_json(path: str, value: Any) -> None:
    with open(path + ".partial", "w") as file:
        json.dump(value, file, indent=1)
    os.replace(path + ".partial", path)
