"""Buckets: the few shapes to which images of many sizes are padded, because each shape is compiled for seconds."""

from collections.abc import Iterable

import numpy as np

Size = tuple[int, int]  # height and width

MOST_BUCKETS = 10  # of all scales together
# A bucket pays if it saves so many pixels of padding: VGG-16 compiles for 3 s, in which 2 cores of a Xeon evaluate as
# many.
LEAST_SAVING = 2**21
CELLS = 8  # Sizes are first grouped in cells of an eighth of the short side, because the merging compares all pairs.


def choose_buckets(sizes: Iterable[Size], most: int = MOST_BUCKETS) -> list[Size]:
    """Return few shapes, so that each image fits into one of them with little padding.

    Begins with a bucket for each cell of sizes, and merges the two buckets whose merging adds the fewest pixels of
    padding, until there are `most` buckets and each saves at least `LEAST_SAVING` pixels.

    Args:
      sizes: the height and width of each image.
      most: the largest number of buckets.

    Returns:
      Heights and widths, those with the fewest pixels first.
    """
    cells: dict[tuple[int, int, int], tuple[int, int, int]] = {}
    for height, width in sizes:
        short = min(height, width)
        cell = (short, -(-height * CELLS // short), -(-width * CELLS // short))
        tallest, widest, count = cells.get(cell, (0, 0, 0))
        cells[cell] = (max(tallest, height), max(widest, width), count + 1)
    buckets = np.array(list(cells.values()))
    while len(buckets) > 1:
        heights, widths, counts = buckets.T
        merged = np.maximum.outer(heights, heights) * np.maximum.outer(widths, widths)
        work = heights * widths * counts
        added = merged * np.add.outer(counts, counts) - np.add.outer(work, work)
        added[np.tril_indices(len(buckets))] = np.iinfo(added.dtype).max
        i, j = np.unravel_index(added.argmin(), added.shape)
        if len(buckets) <= most and added[i, j] >= LEAST_SAVING:
            break
        joined = [*np.maximum(buckets[i, :2], buckets[j, :2]), counts[i] + counts[j]]
        buckets = np.vstack([np.delete(buckets, [i, j], 0), joined])
    return sorted(((int(height), int(width)) for height, width, _ in buckets), key=np.prod)


def fitting_bucket(buckets: Iterable[Size], size: Size) -> Size:
    """Return the first bucket that holds an image.

    Raises:
      ValueError: if none does.
    """
    for bucket in buckets:
        if size[0] <= bucket[0] and size[1] <= bucket[1]:
            return bucket
    raise ValueError(f"an image has {size}; expected a size that fits into one of {list(buckets)}")
