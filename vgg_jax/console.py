"""The output of a command: log lines, progress on one line of the terminal, remarks."""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

LOG_SECONDS = 30  # between two lines of progress if standard error is not a terminal
DRAW_SECONDS = 0.1  # between two drawings of a bar
WIDEST_GRAPHIC = 12  # characters of a bar, without its brackets
NARROWEST_GRAPHIC = 4  # a narrower one shows nothing


class Bar:
    """A line of progress at the bottom of the terminal; nothing if standard error is not a terminal."""

    def __init__(
        self, description: str, total: int | float, unit: str, start: int | float = 0, hidden: bool = False
    ) -> None:
        """Draw the bar.

        Args:
          description: the work, as a noun.
          total: the number of items; 0 if it is not known.
          unit: the items, as a plural noun.
          start: the items that were done before.
          hidden: show nothing.
        """
        self.description, self.total, self.count = description, total, start
        self.fact = ""  # shown behind the time left
        self._unit, self._first = unit, start
        self._begin, self._drawn = time.monotonic(), -1.0
        self._line = tqdm(bar_format="{desc}", leave=False, disable=True if hidden else None)
        self.draw()

    @property
    def visible(self) -> bool:
        """Return whether the bar is on a terminal."""
        return not self._line.disable

    def update(self, count: int | float = 1, facts: Sequence[str] | None = None) -> None:
        """Advance by `count` items, and draw the bar unless it was drawn a moment ago.

        Args:
          count: the items that are done since the last call.
          facts: what to show behind the bar; by default the items, their rate and the time left.
        """
        self.count += count
        if time.monotonic() - self._drawn >= DRAW_SECONDS:
            self.draw(facts)

    def draw(self, facts: Sequence[str] | None = None) -> None:
        """Draw the bar with these facts."""
        if self.visible:
            self._drawn = time.monotonic()
            facts = self._facts() if facts is None else facts
            columns = shutil.get_terminal_size().columns
            line = progress_line(self.description, facts, self.count / max(self.total, 1), columns)
            self._line.set_description_str(line)

    def close(self) -> None:
        """Remove the bar."""
        self._line.close()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _facts(self) -> list[str]:
        of_total = f"/{self.total:,.0f}" if self.total else ""
        facts = [f"{self.count:,.0f}{of_total} {self._unit}"]
        if done := self.count - self._first:
            seconds = max(time.monotonic() - self._begin, 1e-9)
            facts.append(f"{done / seconds:,.1f}/s")
            if self.total:
                facts.append(f"ETA {duration(seconds / done * (self.total - self.count))}")
        return [*facts, self.fact] if self.fact else facts


def progress_line(description: str, facts: Sequence[str], part: int | float | None, columns: int) -> str:
    """Return one line with a description, a graphic and facts that fits a terminal.

    Args:
      description: the work; it loses its middle if it is too long.
      facts: short texts; the last ones are left out if they do not fit.
      part: the part that is done, from 0 to 1; None leaves out the graphic.
      columns: the width of the terminal.

    Returns:
      At most `columns` - 1 characters, because a full line moves the cursor to the next one.
    """
    room = columns - 1
    if len(description) > room // 2:
        half = max(room // 4 - 2, 1)
        description = f"{description[:half]}...{description[-half:]}"
    shown: list[str] = []
    length = len(description)
    for fact in facts:
        length += 2 + len(fact)
        if length > room:
            break
        shown.append(fact)
    line = "  ".join([description, *shown])
    width = min(room - len(line) - 4, WIDEST_GRAPHIC)
    if part is None or width < NARROWEST_GRAPHIC:
        return line
    filled = round(min(max(part, 0), 1) * width)
    return "  ".join([description, f"[{'#' * filled}{' ' * (width - filled)}]", *shown])


def duration(seconds: int | float) -> str:
    """Return a time as minutes and seconds, or hours, minutes and seconds."""
    return str(tqdm.format_interval(seconds))


def progress(items: Sequence[Item], description: str, unit: str, done: int = 0) -> Iterator[Item]:
    """Yield the items and show progress: a bar on a terminal, otherwise a log line every 30 seconds.

    Args:
      items: the items to yield.
      description: the work, as a noun.
      unit: the items, as a plural noun.
      done: the number of items that an earlier run has done, which count too.

    Yields:
      Each item, in order.
    """
    last_line, total = time.monotonic(), done + len(items)
    with Bar(description, total, unit, done) as bar:
        for item in items:
            yield item
            bar.update()
            if not bar.visible and time.monotonic() - last_line > LOG_SECONDS:
                last_line = time.monotonic()
                log(f"{description}: {bar.count:.0f} of {total} {unit}")


def counted(items: Iterable[Item], total: int, description: str, unit: str, hidden: bool = False) -> Iterator[Item]:
    """Yield the items and show a bar, if standard error is a terminal and the bar is not `hidden`."""
    with Bar(description, total, unit, hidden=hidden) as bar:
        for item in items:
            yield item
            bar.update()


@contextlib.contextmanager
def working(description: str) -> Iterator[None]:
    """Show the description and the seconds so far during work of unknown length, if both outputs are terminals."""
    if not on_terminal():
        yield
        return
    begin, ended = time.monotonic(), threading.Event()
    line = tqdm(bar_format="{desc}", leave=False)

    def draw() -> None:
        while True:
            line.set_description_str(f"{description}  {time.monotonic() - begin:.0f} s")
            if ended.wait(1):
                return

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        line.close()


def on_terminal() -> bool:
    """Return whether standard output and standard error are both terminals."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def log(line: str) -> None:
    """Print a line immediately, above the progress bar if there is one."""
    tqdm.write(line)
    sys.stdout.flush()


def note(line: str) -> None:
    """Print a remark to standard error, so that it is no part of a command's answer."""
    tqdm.write(f"note: {line}", file=sys.stderr)
