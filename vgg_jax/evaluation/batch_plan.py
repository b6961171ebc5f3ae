"""The batches of an extraction, a pure function of the images: a resumed run computes the same ones, bit for bit."""

import collections
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vgg_jax.data.image_files import scaled_size
from vgg_jax.evaluation.batches import batch_sizes
from vgg_jax.evaluation.buckets import Size, choose_buckets, fitting_bucket


class PlannedBatch(NamedTuple):
    """Images of one shape that are computed together; blank images fill it up to `size`."""

    start: int  # the number of its first row over all batches
    shape: Size
    size: int
    images: tuple[int, ...]
    scales: tuple[int, ...]  # for each image the index of its scale

    @property
    def stop(self) -> int:
        """Return the number of the row after its last one."""
        return self.start + len(self.images)


class Plan:
    """The batches in the order of their last images.

    Attributes:
      batches: the batches.
      rows: (number of scales, N) int64, the row of each image at each scale; -1 if it has none.
      padded: whether images are smaller than the shape of their batch.
    """

    def __init__(self, batches: list[PlannedBatch], count: int, num_scales: int, padded: bool) -> None:
        """Count the rows of the batches.

        Args:
          batches: the batches.
          count: the number of images.
          num_scales: the number of scales.
          padded: as the attribute.
        """
        self.batches, self.padded = batches, padded
        self.rows = np.full((num_scales, count), -1, np.int64)
        for batch in batches:
            self.rows[list(batch.scales), list(batch.images)] = np.arange(batch.start, batch.stop)

    @property
    def num_rows(self) -> int:
        """Return the number of rows over all batches."""
        return self.batches[-1].stop if self.batches else 0

    def missing(self, done: Sequence[tuple[int, int]]) -> list[PlannedBatch]:
        """Return the batches whose rows are not all in the ranges `done`."""
        covered = np.zeros(self.num_rows, bool)
        for start, stop in done:
            covered[start:stop] = True
        return [batch for batch in self.batches if not covered[batch.start : batch.stop].all()]


def plan_views(count: int, side: int, pixels: int, devices: int) -> Plan:
    """Return the batches of square views of one size.

    Args:
      count: the number of images.
      side: the side of a view.
      pixels: pixels of a batch on one device, at most.
      devices: the number of devices.
    """
    shape = (side, side)
    size = batch_sizes({shape: count}, pixels, devices)[shape]
    starts = range(0, count, size)
    batches = [
        PlannedBatch(start, shape, size, tuple(range(start, min(start + size, count))), (0,) * min(size, count - start))
        for start in starts
    ]
    return Plan(batches, count, 1, padded=False)


def plan_scales(sizes: Mapping[int, Size], count: int, scales: Sequence[int], pixels: int, devices: int) -> Plan:
    """Return the batches of whole images at several scales, padded to few shapes.

    Args:
      sizes: the height and width of each image that can be read, in order.
      count: the number of images.
      scales: the short sides to which the images are resized.
      pixels: pixels of a batch on one device, at most, unless one image has more.
      devices: the number of devices.
    """
    scaled = {
        (index, place): scaled_size(size, scale) for index, size in sizes.items() for place, scale in enumerate(scales)
    }
    buckets = choose_buckets(scaled.values())
    fitting = {tile: fitting_bucket(buckets, size) for tile, size in scaled.items()}
    capacity = batch_sizes(collections.Counter(fitting.values()), pixels, devices)
    waiting: dict[Size, list[tuple[int, int]]] = collections.defaultdict(list)
    batches: list[PlannedBatch] = []

    def end(shape: Size) -> None:
        images, places = zip(*waiting.pop(shape), strict=True)
        start = batches[-1].stop if batches else 0
        batches.append(PlannedBatch(start, shape, capacity[shape], images, places))

    for tile, shape in fitting.items():
        waiting[shape].append(tile)
        if len(waiting[shape]) == capacity[shape]:
            end(shape)
    for shape in sorted(waiting, key=lambda shape: waiting[shape][-1]):
        end(shape)
    return Plan(batches, count, len(scales), padded=set(fitting.values()) != set(scaled.values()))
