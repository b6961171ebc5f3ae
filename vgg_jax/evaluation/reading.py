"""The images of a split, decoded by threads."""

import collections
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import PIL.Image

from vgg_jax.console import note, progress
from vgg_jax.data.dataset import CorruptImageError
from vgg_jax.errors import UserError

View = TypeVar("View")

MOST_CORRUPT = 100  # corrupt images that an evaluation may skip, as a run
AHEAD = 4  # images for each thread that are decoded before they are needed


@runtime_checkable
class LabeledImages(Protocol):
    """What evaluation needs of a split: `data.dataset.Split` without its imports."""

    name: str  # dataset/split
    num_classes: int
    channels: int
    label_shape: tuple[int, ...]  # (): one class; (K,): zeros and ones for K classes, or K numbers

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def image(self, index: int) -> tuple[PIL.Image.Image, Any]:
        """Return an image and its label."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image, without decoding it if possible."""
        ...


class Reader:
    """The images of a split in order, and their labels.

    Attributes:
      labels: (N,) int32 classes or (N, K) float32 numbers, of the images that were read.
      readable: (N,) bool, False for corrupt images that were skipped.
    """

    def __init__(
        self, split: LabeledImages, skip_corrupt: bool = False, most_corrupt: int = MOST_CORRUPT, task: int = 1
    ) -> None:
        """Prepare to read.

        Args:
          split: the images.
          skip_corrupt: whether to skip images that cannot be decoded; otherwise they raise UserError.
          most_corrupt: the images that may be skipped; at least one is always required.
          task: consecutive images that a thread reads in one task. A task costs 0.05 ms, as much as a JPEG of 32x32.
        """
        self._split, self._skip_corrupt, self._most_corrupt = split, skip_corrupt, most_corrupt
        self._task = task
        self.labels = np.zeros((len(split), *split.label_shape), np.float32 if split.label_shape else np.int32)
        self.readable = np.ones(len(split), bool)

    def __len__(self) -> int:
        return len(self._split)

    def views(self, view: Callable[[int, PIL.Image.Image], View], description: str) -> Iterator[tuple[int, View]]:
        """Yield the index and the view of each image that is not corrupt, in order.

        Args:
          view: a function of the index and the image, which runs in the threads too.
          description: the work, for the line of progress.

        Raises:
          UserError: if an image cannot be read, or too many are corrupt.
        """

        def read(index: int) -> View:
            image, self.labels[index] = self._split.image(index)
            return view(index, image)

        return self.results(read, description)

    def sizes(self, description: str) -> Iterator[tuple[int, int]]:
        """Yield the height and width of each image that is not found corrupt; raise as `views`."""
        return (size for _, size in self.results(self._split.size, description))

    def results(
        self,
        function: Callable[[int], View],
        description: str,
        indices: Sequence[int] | None = None,
        done: int = 0,
    ) -> Iterator[tuple[int, View]]:
        """Yield the index of each image that is not corrupt and the result of a function of the index, in order.

        Args:
          function: runs in the threads; raises CorruptImageError if the image is corrupt.
          description: the work, for the line of progress.
          indices: the images, by default all that are not found corrupt so far.
          done: images of an earlier run, for the line of progress.

        Raises:
          UserError: if an image cannot be read, or too many are corrupt.
        """

        def read(chunk: Sequence[int]) -> list[tuple[View | None, CorruptImageError | None]]:
            found: list[tuple[View | None, CorruptImageError | None]] = []
            for index in chunk:
                try:
                    found.append((function(index), None))
                except CorruptImageError as error:
                    found.append((None, error))
            return found

        threads = available_processors()
        executor = ThreadPoolExecutor(threads)
        indices = np.flatnonzero(self.readable).tolist() if indices is None else indices
        chunks = [indices[start : start + self._task] for start in range(0, len(indices), self._task)]
        ahead = AHEAD * threads
        waiting: collections.deque[Future[list[tuple[View | None, CorruptImageError | None]]]] = collections.deque()
        try:
            current: Iterator[tuple[View | None, CorruptImageError | None]] = iter(())
            for place, index in enumerate(progress(indices, description, "images", done)):
                number, row = divmod(place, self._task)
                if row == 0:
                    for chunk in chunks[number + len(waiting) : number + ahead]:
                        waiting.append(executor.submit(read, chunk))
                    current = iter(waiting.popleft().result())
                found, error = next(current)
                if error is not None:
                    self._skip(index, error)
                else:
                    yield index, found  # type: ignore[misc] # a result without an error is a View
        finally:
            executor.shutdown(cancel_futures=True)

    def _skip(self, index: int, error: CorruptImageError) -> None:
        """Count a corrupt image; raise UserError if it may not be skipped."""
        if not self._skip_corrupt:
            raise UserError(f"{error}; replace or remove it") from None
        self.readable[index] = False
        skipped = len(self) - int(self.readable.sum())
        note(f"skipped corrupt image {skipped}: {error}")
        if skipped == len(self) == self._most_corrupt:
            raise UserError(
                f"{self._split.name} has no image that can be read; expected at least one: replace the files"
            )
        most = min(self._most_corrupt, len(self) - 1)
        if skipped > most:
            raise UserError(f"{self._split.name} has more than {most} corrupt images; replace or remove them")


def available_processors() -> int:
    """Return the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
