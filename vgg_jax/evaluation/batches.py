"""Batches of padded images on all devices, whose results are fetched while later batches are computed."""

import collections
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import UInt8

from vgg_jax.evaluation.buckets import Size, fitting_bucket

AHEAD = 2  # batches in computation before the results of an earlier one are fetched


class Tile(NamedTuple):
    """An image or a crop to evaluate, and its share in the posteriors of its image."""

    image: int  # its index in the split
    pixels: UInt8[np.ndarray, "h w c"]
    weight: float = 1.0


def local_mesh(images: int) -> Mesh:
    """Return a mesh of this process's devices, but no more than images, with the one axis `data`."""
    return Mesh(np.array(jax.local_devices()[: max(images, 1)]), ("data",))


def replicated(variables: Mapping[str, Any], mesh: Mesh) -> Any:
    """Return variables with a copy on each device."""
    return jax.device_put(variables, NamedSharding(mesh, P()))


def batch_sizes(counts: Mapping[Size, int], pixels: int, devices: int) -> dict[Size, int]:
    """Return the batch size of each bucket, a multiple of the number of devices.

    A smaller batch that divides the images evenly is taken, so that the last one needs little filling.

    Args:
      counts: the number of images in each bucket.
      pixels: pixels of a batch on one device, at most, unless one image has more.
      devices: the number of devices.
    """
    sizes = {}
    for (height, width), count in counts.items():
        largest = devices * max(1, pixels // (height * width))
        batches = -(-count // largest)
        sizes[height, width] = -(-count // (batches * devices)) * devices
    return sizes


def add_posteriors(
    posteriors: np.ndarray,
    function: Any,
    variables: Any,
    tiles: Iterable[Tile],
    sizes: Mapping[Size, int],
    mesh: Mesh,
) -> None:
    """Add the posteriors of tiles, times their weights, to the rows of their images.

    Args:
      posteriors: (N, num_classes) float32, to add to.
      function: a jitted function of the variables, padded images (N, H, W, C) uint8 and their true heights and widths
        (N, 2); it returns (N, num_classes).
      variables: the variables, on each device.
      tiles: the tiles, of any sizes that the buckets hold.
      sizes: the batch size of each bucket, in the order of their pixels.
      mesh: the devices.
    """
    sharding = NamedSharding(mesh, P(*mesh.axis_names))
    waiting: dict[Size, list[Tile]] = collections.defaultdict(list)
    running: collections.deque[tuple[list[Tile], jax.Array]] = collections.deque()

    def start(bucket: Size) -> None:
        batch = waiting.pop(bucket)
        images, true_sizes = _padded(batch, bucket, sizes[bucket])
        result = function(variables, *jax.device_put((images, true_sizes), sharding))
        result.copy_to_host_async()
        running.append((batch, result))

    def fetch() -> None:
        batch, result = running.popleft()
        weights = np.array([tile.weight for tile in batch], np.float32)
        np.add.at(posteriors, [tile.image for tile in batch], np.asarray(result)[: len(batch)] * weights[:, None])

    for tile in tiles:
        bucket = fitting_bucket(sizes, tile.pixels.shape[:2])
        waiting[bucket].append(tile)
        if len(waiting[bucket]) == sizes[bucket]:
            start(bucket)
            if len(running) > AHEAD:
                fetch()
    for bucket in list(waiting):
        start(bucket)
        if len(running) > AHEAD:
            fetch()
    while running:
        fetch()


def _padded(batch: list[Tile], bucket: Size, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` padded images and their true sizes; blank images of the bucket's size fill up the batch."""
    images = np.zeros((count, *bucket, batch[0].pixels.shape[2]), np.uint8)
    sizes = np.full((count, 2), bucket, np.int32)
    for row, tile in enumerate(batch):
        height, width = sizes[row] = tile.pixels.shape[:2]
        images[row, :height, :width] = tile.pixels
    return images, sizes
