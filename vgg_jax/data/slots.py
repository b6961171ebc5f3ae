"""Batches in host memory, whose rows are written by the threads that read the examples."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


class Slots:
    """Batches that threads fill row by row.

    The arrays of a batch are allocated once. Each thread writes its views into their rows, so the thread that uses the
    batch copies nothing.
    """

    def __init__(self, example: Callable[[int], Mapping[str, Any]], count: int, batch_size: int) -> None:
        """Prepare to fill `count` rows.

        Args:
          example: returns the entries of a row, from 0 to `count` - 1, with the same shapes and dtypes for each row.
          count: number of rows.
          batch_size: rows of a batch; the last batch may have fewer.
        """
        self._example, self._count, self._batch_size = example, count, batch_size
        self._batches: dict[int, dict[str, np.ndarray]] = {}
        self._lock = threading.Lock()

    def fill(self, rows: range) -> int:
        """Read the examples of some rows into their batches; return the end of `rows`. Threads may call it at once."""
        for row in rows:
            values = self._example(row)
            number, place = divmod(row, self._batch_size)
            for name, array in self._allocated(number, values).items():
                array[place] = values[name]
        return rows.stop

    def take(self, number: int) -> dict[str, np.ndarray]:
        """Return a batch that is complete, and forget it."""
        with self._lock:
            return self._batches.pop(number)

    def _allocated(self, number: int, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        with self._lock:
            if number not in self._batches:
                size = min(self._batch_size, self._count - number * self._batch_size)
                like = {name: np.asarray(value) for name, value in values.items()}
                self._batches[number] = {name: np.empty((size, *x.shape), x.dtype) for name, x in like.items()}
            return self._batches[number]
