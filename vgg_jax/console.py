"""The output of a command: log lines and progress."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

LOG_SECONDS = 30  # between two lines of progress if standard error is not a terminal


def progress(items: Sequence[Item], description: str, unit: str) -> Iterator[Item]:
    """Yield the items and show progress: a bar on a terminal, otherwise a log line every 30 seconds.

    Args:
      items: the items to yield.
      description: the work, as a noun.
      unit: the items, as a plural noun.

    Yields:
      Each item, in order.
    """
    last_line = time.monotonic()
    with tqdm(total=len(items), desc=description, unit=f" {unit}", disable=None) as bar:
        for i, item in enumerate(items, 1):
            yield item
            bar.update()
            if bar.disable and time.monotonic() - last_line > LOG_SECONDS:
                last_line = time.monotonic()
                log(f"{description}: {i} of {len(items)} {unit}")


def log(line: str) -> None:
    """Print a line immediately, above the progress bar if there is one."""
    tqdm.write(line)
    sys.stdout.flush()


def note(line: str) -> None:
    """Print a remark to standard error, so that it is no part of a command's answer."""
    tqdm.write(f"note: {line}", file=sys.stderr)
