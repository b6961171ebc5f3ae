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
from vgg_jax.runtime import placed

Part = tuple[str, int]  # a view and its scale
AHEAD = 2  # batches in computation before the results of an earlier one are fetched


class Tile(NamedTuple):
    """An image or a crop to evaluate, and its share in the posteriors of its image."""

    part: Part
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
    posteriors: Mapping[Part, np.ndarray],
    functions: Mapping[str, Any],
    variables: Any,
    tiles: Iterable[Tile],
    sizes: Mapping[str, Mapping[Size, int]],
    mesh: Mesh,
) -> None:
    """Add the posteriors of tiles, times their weights, to the rows of their images.

    Tiles of one view share batches, at whatever scale.

    Args:
      posteriors: (N, num_classes) float32 of each part, to add to.
      functions: for each view a jitted function of the variables, padded images (N, H, W, C) uint8 and their true
        heights and widths (N, 2); it returns (N, num_classes).
      variables: the variables, on each device.
      tiles: the tiles, of any sizes that the buckets of their view hold.
      sizes: for each view the batch size of each bucket, in the order of their pixels.
      mesh: the devices.
    """
    sharding = NamedSharding(mesh, P(*mesh.axis_names))
    waiting: dict[tuple[str, Size], list[Tile]] = collections.defaultdict(list)
    running: collections.deque[tuple[list[Tile], jax.Array]] = collections.deque()

    def start(view: str, bucket: Size) -> None:
        batch = waiting.pop((view, bucket))
        images, true_sizes = _padded(batch, bucket, sizes[view][bucket])
        result = functions[view](variables, *placed((images, true_sizes), sharding))
        result.copy_to_host_async()
        running.append((batch, result))
        if len(running) > AHEAD:
            fetch()

    def fetch() -> None:
        batch, result = running.popleft()
        for tile, row in zip(batch, np.asarray(result), strict=False):  # blank images fill up the batch
            posteriors[tile.part][tile.image] += row * np.float32(tile.weight)

    for tile in tiles:
        view = tile.part[0]
        bucket = fitting_bucket(sizes[view], tile.pixels.shape[:2])
        waiting[view, bucket].append(tile)
        if len(waiting[view, bucket]) == sizes[view][bucket]:
            start(view, bucket)
    for view, bucket in list(waiting):
        start(view, bucket)
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
