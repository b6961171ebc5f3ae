"""Reads damaged files: thousands of mutations of files of every kind that users bring.

    python -m tests.fuzz [KIND...] [--count 20000] [--seed 0]

Each mutation must give a result or a UserError: no other exception, no more than 5 seconds and no more than 1 GB of
memory. Prints a line for each kind and one for each failure, and exits with 1 if there is any. A failure names its
number, from which the same mutation can be made again.
"""

import argparse
import faulthandler
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from tests import damage, valid_files

SECONDS, GROWTH = 5.0, 2**30
BLOCK = 1000  # mutations that one process reads


class Kind(NamedTuple):
    """One kind of file: its valid examples, how to mutate one, and how users' files of this kind are read."""

    examples: Callable[[pathlib.Path], dict[str, bytes]]  # writes into a folder, returns contents by name
    mutate: Callable[[random.Random, bytes], bytes]
    read: Callable[[pathlib.Path, str, bytes], Any]  # of the folder, the name and the mutated content


KINDS = {
    "pth": Kind(valid_files.weights(".pth"), damage.mutate_pth, valid_files.read_weights),
    "safetensors": Kind(valid_files.weights(".safetensors"), damage.mutate_safetensors, valid_files.read_weights),
    "h5": Kind(valid_files.weights(".h5"), damage.mutate_zip, valid_files.read_weights),
    "onnx": Kind(valid_files.weights(".onnx"), damage.mutate_onnx, valid_files.read_weights),
    "jpeg": Kind(valid_files.images(".jpg"), damage.mutate_bytes, valid_files.read_image_file),
    "png": Kind(valid_files.images(".png"), damage.mutate_png, valid_files.read_image_file),
    "config": Kind(valid_files.run("config.json"), damage.mutate_json, valid_files.read_run),
    "run": Kind(
        valid_files.run("_CHECKPOINT_METADATA", "_METADATA", "metrics", "manifest.ocdbt"),
        damage.mutate_run,
        valid_files.read_run,
    ),
}


def make_networks_tiny() -> None:
    """Give all networks of this process a hundredth of the paper's channels, so that a file is read in milliseconds."""
    from vgg_jax.model import TABLE_1

    for column, stages in TABLE_1.items():
        TABLE_1[column] = tuple(tuple(max(1, width // 64) for width in stage) for stage in stages)


def _seconds(kind: str, folder: pathlib.Path, name: str, data: bytes) -> float:
    """Read a file and return the time that it took, also for a file that is refused too late."""
    from vgg_jax.errors import UserError

    start = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            KINDS[kind].read(folder, name, data)
    except UserError:
        if time.monotonic() - start <= SECONDS:
            raise
    return time.monotonic() - start


def fuzz(kind: str, count: int, seed: int = 0, first: int = 0) -> list[str]:
    """Read `count` mutations of files of one kind; return a line for each failure.

    Args:
      kind: a name in KINDS.
      count: the number of mutations.
      seed: the seed of all mutations.
      first: the number of the first mutation.
    """
    from vgg_jax.errors import UserError

    failures, refused = [], 0
    with tempfile.TemporaryDirectory() as directory:
        folder = pathlib.Path(directory)
        contents = KINDS[kind].examples(folder)
        for name, content in contents.items():
            KINDS[kind].read(folder, name, content)  # a valid example must be read; this also warms up
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for i in range(first, first + count):
            generator = random.Random(f"{kind}/{seed}/{i}")
            name = generator.choice(list(contents))
            data = KINDS[kind].mutate(generator, contents[name])
            faulthandler.dump_traceback_later(60, exit=True)  # ends a hang; the traceback shows where
            try:
                if _seconds(kind, folder, name, data) > SECONDS:  # again: another process may have had the processor
                    seconds = _seconds(kind, folder, name, data)
                    if seconds > SECONDS:
                        failures.append(f"{kind} {i} ({name}): took {seconds:.1f} s")
            except UserError:
                refused += 1
            except Exception as error:
                failures.append(f"{kind} {i} ({name}): {type(error).__name__}: {error}")
            before, largest = largest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            if largest - before > GROWTH:
                failures.append(f"{kind} {i} ({name}): {(largest - before) / 2**30:.1f} GiB more memory")
        faulthandler.cancel_dump_traceback_later()
    read = count - refused - len(failures)
    print(f"{kind}: {count} mutations, {refused} refused, {read} read, {len(failures)} failures")
    return failures


def _in_processes(options: argparse.Namespace) -> int:
    """Fuzz in blocks, each in a process of its own, because JAX and Orbax keep a little of every network they read."""
    worst = 0
    for kind in options.kinds or KINDS:
        for first in range(options.first, options.first + options.count, BLOCK):
            count = min(BLOCK, options.first + options.count - first)
            command = [sys.executable, "-m", "tests.fuzz", kind, "--seed", str(options.seed)]
            done = subprocess.run([*command, "--count", str(count), "--first", str(first)], check=False)
            worst = max(worst, abs(done.returncode))
    return worst


def main() -> int:
    """Run the command; return 1 if anything has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--count", type=int, default=20_000, help="mutations of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation (default: %(default)s)")
    options = parser.parse_args()
    make_networks_tiny()
    if options.count > BLOCK:
        return _in_processes(options)
    failures = [
        line for kind in options.kinds or KINDS for line in fuzz(kind, options.count, options.seed, options.first)
    ]
    print(*failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
