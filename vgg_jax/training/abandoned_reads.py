"""Reads of a damaged checkpoint that Orbax has abandoned, and the messages that they would print."""

import functools
import logging
import sys
from typing import Any

# Texts in the messages of TensorStore and Orbax. A read that waits when its loop is closed ends with the second one.
OF_READS = ("tensorstore_spec", "Encountered error while reading array index")


@functools.cache
def silence_abandoned_reads() -> None:
    """Drop the messages of abandoned reads, for the rest of the process.

    Orbax reads all arrays of a checkpoint in one event loop. When one array cannot be read, it raises that error and
    closes the loop. The reads of the other arrays end later, in threads of TensorStore: they find the loop closed, or
    fail for the same reason. Each would print a traceback, although the first error has been reported.
    """
    show = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not _is_abandoned(unraisable.exc_value):
            show(unraisable)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(lambda record: not (record.exc_info and _is_abandoned(record.exc_info[1])))


def _is_abandoned(error: BaseException | None) -> bool:
    return str(error) == "Event loop is closed" or any(text in str(error) for text in OF_READS)
