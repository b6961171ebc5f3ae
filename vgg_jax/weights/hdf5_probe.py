"""Reads the structure of HDF5 files in a process of its own, because a damaged file can hang or crash the HDF5 library.

`python hdf5_probe.py` reads paths from its standard input, one a line. It answers each with a line when it has visited
all groups, attributes and chunked arrays, and ends if these need far more memory than the file has bytes.
`check_structure` runs it once and asks it about each file.
"""

import atexit
import contextlib
import functools
import io
import os
import select
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from typing import Any

SECONDS = 4.0  # for one file, beside a second for each GB
MEMORY = 2**29  # bytes for one file, beside twice its size


def check_structure(path: str) -> bool:
    """Return whether the HDF5 library visits the whole file without a hang, a crash or a huge array.

    The library may raise errors, which reading the file then raises too.

    Args:
      path: an HDF5 file, or an archive of Keras with one.
    """
    process = _process()
    seconds = SECONDS + os.path.getsize(path) / 2**30
    with contextlib.suppress(OSError):  # the process has ended
        process.stdin.write(os.path.abspath(path).encode("unicode_escape") + b"\n")
        process.stdin.flush()
        if select.select([process.stdout], [], [], seconds)[0] and process.stdout.readline():
            return True
    process.kill()
    _end(process)
    _process.cache_clear()
    return False


def _end(process: Any) -> None:
    with contextlib.suppress(OSError):  # of a pipe that is broken
        process.stdin.close()
    process.stdout.close()
    process.wait()


@functools.cache
def _process() -> Any:
    """Start the process, which ends when its standard input does."""
    command = [sys.executable, "-I", __file__]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.readline()  # the process has imported h5py
    atexit.register(_end, process)
    return process


def _visit(group: Any, visited: set[int]) -> None:
    import h5py  # here, because the module is imported where h5py may be missing

    address = h5py.h5o.get_info(group.id).addr
    if address in visited:  # by another link
        return
    visited.add(address)
    for name in list(group.attrs):
        with _tolerant():
            _ = group.attrs[name]
    for name in group if hasattr(group, "keys") else ():
        with _tolerant():
            item = group[name]
            _visit(item, visited)
            if getattr(item, "chunks", None) and item.nbytes < 2**30:
                _ = item[()]


@contextlib.contextmanager
def _tolerant() -> Iterator[None]:
    """Ignore all errors but those of memory: the reader names the damage."""
    try:
        yield
    except Exception as error:  # of many kinds, from h5py and the HDF5 library
        if isinstance(error, MemoryError) or "alloc" in str(error):
            raise MemoryError from None


def _limit_memory(extra: int) -> None:
    """Limit the memory of this process to `extra` bytes more than it has now; Linux only."""
    with contextlib.suppress(OSError, ImportError, ValueError), open("/proc/self/statm") as file:
        import resource

        now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + extra, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _visit_file(path: str) -> None:
    import h5py  # here, because the module is imported where h5py may be missing

    _limit_memory(MEMORY + 2 * os.path.getsize(path))
    source: Any = path
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            source = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(source, "r") as file:
        _visit(file, set())


if __name__ == "__main__":
    import h5py  # noqa: F401 - imported before the first file

    print("ready", flush=True)
    for line in sys.stdin.buffer:
        with _tolerant():
            _visit_file(line.rstrip(b"\n").decode("unicode_escape"))
        print("visited", flush=True)
