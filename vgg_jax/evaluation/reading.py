"""The images of a split, decoded by threads."""

import collections
import os
from collections.abc import Callable, Iterator
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

    def __init__(self, split: LabeledImages, skip_corrupt: bool = False) -> None:
        """Prepare to read.

        Args:
          split: the images.
          skip_corrupt: whether to skip images that cannot be decoded; otherwise they raise UserError.
        """
        self._split, self._skip_corrupt = split, skip_corrupt
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

        return self._results(read, description)

    def sizes(self, description: str) -> Iterator[tuple[int, int]]:
        """Yield the height and width of each image that is not found corrupt; raise as `views`."""
        return (size for _, size in self._results(self._split.size, description))

    def _results(self, function: Callable[[int], View], description: str) -> Iterator[tuple[int, View]]:
        """Yield the index of each image that is not corrupt and the result of a function of it, in order."""

        def read(index: int) -> tuple[View | None, CorruptImageError | None]:
            try:
                return function(index), None
            except CorruptImageError as error:
                return None, error

        threads = available_processors()
        executor = ThreadPoolExecutor(threads)
        try:
            indices = np.flatnonzero(self.readable).tolist()
            waiting: collections.deque[Future[tuple[View | None, CorruptImageError | None]]] = collections.deque()
            for place, index in enumerate(progress(indices, description, "images")):
                for next_index in indices[place + len(waiting) : place + AHEAD * threads]:
                    waiting.append(executor.submit(read, next_index))
                found, error = waiting.popleft().result()
                if error is not None:
                    self._skip(index, error)
                elif found is not None:
                    yield index, found
        finally:
            executor.shutdown(cancel_futures=True)

    def _skip(self, index: int, error: CorruptImageError) -> None:
        """Count a corrupt image; raise UserError if it may not be skipped."""
        if not self._skip_corrupt:
            raise UserError(f"{error}; replace or remove it") from None
        self.readable[index] = False
        skipped = len(self) - int(self.readable.sum())
        note(f"skipped corrupt image {skipped}: {error}")
        most = min(MOST_CORRUPT, len(self) - 1)
        if skipped > most:
            raise UserError(f"{self._split.name} has more than {most} corrupt images; replace or remove them")


def available_processors() -> int:
    """Return the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
