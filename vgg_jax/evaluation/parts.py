"""Rows of features that an extraction has computed: parts on disk, from which a killed run resumes, or in memory."""

import bisect
import contextlib
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import filelock
import numpy as np
import safetensors.numpy

from vgg_jax.console import note
from vgg_jax.errors import UserError
from vgg_jax.weights.tensor_file import open_tensor_file

KEY, LOCK = "key.json", "lock"
FLUSH_SECONDS = 10  # a killed run loses the rows of the last seconds
FLUSH_BYTES = 2**26
TEXT = "text:"  # begins the name of an array of strings, because .safetensors has none
OPEN_PARTS = 16  # that are mapped into memory at once

Rows = dict[str, np.ndarray]  # arrays with one entry for each row


@runtime_checkable
class RowStore(Protocol):
    """A place for computed rows, which are numbered from 0."""

    def add(self, start: int, rows: Rows) -> None:
        """Keep consecutive rows, beginning with row `start`."""
        ...

    def gather(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return one of the arrays at some rows, in their order."""
        ...

    def done(self) -> list[tuple[int, int]]:
        """Return the ranges of rows that are kept, in order."""
        ...

    def flush(self) -> None:
        """Write what is kept in memory only."""
        ...


class MemoryRows:
    """Rows in memory."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, Rows]] = []

    def add(self, start: int, rows: Rows) -> None:
        """Keep consecutive rows, beginning with row `start`."""
        self._parts.append((start, rows))

    def done(self) -> list[tuple[int, int]]:
        """Return no range: there is no earlier run."""
        return []

    def flush(self) -> None:
        """Do nothing."""

    @functools.cached_property
    def _arrays(self) -> Rows:
        parts = [rows for _, rows in sorted(self._parts, key=lambda part: part[0])]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def gather(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return one of the arrays at some rows, in their order."""
        taken: np.ndarray = self._arrays[name][rows]
        return taken


class Part(NamedTuple):
    """A file of consecutive rows."""

    start: int
    stop: int
    path: str


class PartFiles:
    """Rows in files of a directory, which is created when the first rows are written.

    Each file has the checksum of its arrays, and appears complete or not at all.
    """

    def __init__(self, directory: str, key: Mapping[str, Any], overwrite: bool = False) -> None:
        """Open the directory, and find the rows of an earlier run with the same key.

        Args:
          directory: the directory of the parts.
          key: everything that the rows depend on, by the names to use in messages.
          overwrite: remove the rows of a run with another key; otherwise they raise UserError.

        Raises:
          UserError: if another process uses the directory, or it has rows of another key.
        """
        self._directory, self._key = directory, json.loads(json.dumps(key))
        self._waiting: list[tuple[int, Rows]] = []
        self._parts: list[Part] = []
        self._flushed = time.monotonic()
        self._open = functools.lru_cache(maxsize=OPEN_PARTS)(lambda path: open_tensor_file(path).arrays)
        with self._reports_errors():
            os.makedirs(directory, exist_ok=True)
            self._lock = filelock.FileLock(os.path.join(directory, LOCK), timeout=0)
            try:
                self._lock.acquire()
            except filelock.Timeout:
                raise UserError(
                    f"{directory} is in use by another process; expected one run at a time: wait until it ends, or "
                    "choose another output"
                ) from None
            try:
                self._resume(overwrite)
            except BaseException:
                self._lock.release()
                raise

    def _resume(self, overwrite: bool) -> None:
        """Find the parts of an earlier run, or begin a new one."""
        found = self._stored_key()
        if found is not None and found != self._key:
            changed = [name for name in {**found, **self._key} if found.get(name) != self._key.get(name)]
            if not overwrite:
                raise UserError(
                    f"{self._directory} holds an unfinished extraction of other {', '.join(changed)}; expected the "
                    "same to resume it: run it as before, or add --overwrite to discard it"
                )
            note(f"{self._directory}: discarded an unfinished extraction of other {', '.join(changed)}")
        if found != self._key:
            for name in os.listdir(self._directory):
                if name != LOCK:
                    os.remove(os.path.join(self._directory, name))
            self._write(KEY, json.dumps(self._key).encode())
        for name in sorted(os.listdir(self._directory)):
            path = os.path.join(self._directory, name)
            if name.endswith(".partial"):
                os.remove(path)
            elif name.endswith(".safetensors"):
                if part := _intact_part(path):
                    self._parts.append(part)
                else:
                    note(f"{path} is damaged; its rows are computed again")
                    os.remove(path)
        self._parts.sort()

    def _stored_key(self) -> dict[str, Any] | None:
        """Return the key of the earlier run; None if there is no complete one."""
        try:
            with open(os.path.join(self._directory, KEY), "rb") as file:
                return dict(json.loads(file.read()))
        except (OSError, ValueError):
            return None

    def done(self) -> list[tuple[int, int]]:
        """Return the ranges of rows on disk, in order."""
        return [(part.start, part.stop) for part in self._parts]

    def add(self, start: int, rows: Rows) -> None:
        """Keep consecutive rows, beginning with row `start`; write a file if enough are waiting."""
        if self._waiting and start != self._waiting[-1][0] + _length(self._waiting[-1][1]):
            self.flush()
        self._waiting.append((start, rows))
        size = sum(array.nbytes for _, waiting in self._waiting for array in waiting.values())
        if time.monotonic() - self._flushed > FLUSH_SECONDS or size >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are waiting as one file."""
        if not self._waiting:
            return
        start = self._waiting[0][0]
        rows = {name: np.concatenate([part[name] for _, part in self._waiting]) for name in self._waiting[0][1]}
        stop = start + _length(rows)
        name = f"{start:012d}-{stop:012d}.safetensors"
        rows = {TEXT + name if array.dtype.kind == "S" else name: _as_numbers(array) for name, array in rows.items()}
        content = safetensors.numpy.save(rows, {"sha256": _checksum(rows)})
        with self._reports_errors():
            self._write(name, content)
        bisect.insort(self._parts, Part(start, stop, os.path.join(self._directory, name)))
        self._waiting, self._flushed = [], time.monotonic()

    def gather(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return one of the arrays at some rows, in their order."""
        starts = [part.start for part in self._parts]
        places = np.searchsorted(starts, rows, "right") - 1
        found, taken = [], []
        for place in np.unique(places):
            part = self._parts[place]
            (chosen,) = np.nonzero(places == place)
            found.append(chosen)
            taken.append(_as_stored(self._open(part.path), name)[rows[chosen] - part.start])
        values = np.concatenate(taken)
        result = np.empty_like(values)
        result[np.concatenate(found)] = values
        return result

    def remove(self) -> None:
        """Remove the directory."""
        self._open.cache_clear()
        self._lock.release()
        shutil.rmtree(self._directory, ignore_errors=True)

    def close(self) -> None:
        """Release the directory for other processes."""
        self._open.cache_clear()
        self._lock.release()

    def _write(self, name: str, content: bytes) -> None:
        write_atomically(os.path.join(self._directory, name), content)

    @contextlib.contextmanager
    def _reports_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self._directory}: {error.strerror or error}; free disk space or choose another output, "
                "then rerun to resume"
            ) from None


def write_atomically(path: str, content: bytes) -> None:
    """Write a file that appears complete or not at all, also if the machine stops."""
    with open(path + ".partial", "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".partial", path)


def _as_numbers(array: np.ndarray) -> np.ndarray:
    """Return an array of strings of bytes as (N, width) uint8, and other arrays as they are."""
    contiguous = np.ascontiguousarray(array)
    return contiguous.view(np.uint8).reshape(len(array), -1) if array.dtype.kind == "S" else contiguous


def _as_stored(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Return the array that was stored under a name: the inverse of `_as_numbers`."""
    if name in arrays:
        return arrays[name]
    numbers = np.ascontiguousarray(arrays[TEXT + name])
    return numbers.view(f"S{numbers.shape[1]}")[:, 0]


def _length(rows: Rows) -> int:
    return len(next(iter(rows.values())))


def _checksum(rows: Mapping[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for name in sorted(rows):
        total.update(name.encode())
        total.update(np.ascontiguousarray(rows[name]).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def _intact_part(path: str) -> Part | None:
    """Return the part in a file; None if the file is damaged."""
    try:
        start, stop = map(int, os.path.basename(path).removesuffix(".safetensors").split("-"))
        content = open_tensor_file(path)
    except (UserError, ValueError):
        return None
    intact = content.metadata.get("sha256") == _checksum(content.arrays)
    return Part(start, stop, path) if intact else None
