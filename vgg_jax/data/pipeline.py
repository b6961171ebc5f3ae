"""The host pipeline: which examples make up a batch, and how they reach the devices."""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from vgg_jax.config import DataConfig
from vgg_jax.data.order import train_indices
from vgg_jax.data.sources import Split
from vgg_jax.errors import UserError

Batch = dict[str, jax.Array]  # image (N, H, W, C) uint8, label (N,) int32; for evaluation, weight (N,) float32
Example = dict[str, Any]  # arrays: image and label of one example, or of a batch on the host

RESIDENT_BYTES = 2**31  # a split up to this size lives on each device whole
BATCHES_AHEAD = 2


class Loader:
    """Batches of one split, sharded over the mesh's `data` axis.

    A split whose views on the host are fixed, and that fits, is decoded once and lives on each device whole; others
    are decoded by threads while the devices work. Both ways give the same batches.
    """

    def __init__(self, split: Split, config: DataConfig, mesh: Mesh, resident: bool | None = None) -> None:
        """Opens the split; `resident` overrides the choice between the two ways."""
        self.split = split
        self._read_options = grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=256)
        self._random_view = config.train_view == "random_resized_crop"
        self._sharding = NamedSharding(mesh, P("data"))
        if resident is None:
            size = len(split) * split.image_size**2 * split.channels
            resident = not self._random_view and size <= RESIDENT_BYTES
        self._resident = jax.device_put(self._read_all(), NamedSharding(mesh, P())) if resident else None
        self._gather = jax.jit(
            lambda data, indices: jax.tree.map(lambda a: a[indices], data), out_shardings=self._sharding
        )

    def train_batches(self, seed: int, batch_size: int, steps: range) -> Iterator[Batch]:
        """The batches of the given training steps, each a pure function of (seed, step)."""
        n = len(self.split)
        if self._resident is not None:
            return self._gathered(train_indices(seed, step, batch_size, n) for step in steps)

        def example(position: int) -> Example:
            index = train_indices(seed, position // batch_size, batch_size, n)[position % batch_size]
            return self._example(index, (seed, position) if self._random_view else None)

        return self._streamed(example, range(steps.start * batch_size, steps.stop * batch_size), batch_size)

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Every example once, in order; the last batch is filled up with examples of weight 0."""
        n, devices = len(self.split), self._sharding.mesh.size
        batch_size = -(-min(batch_size, n) // devices) * devices
        positions = np.arange(-(-n // batch_size) * batch_size)
        indices = np.where(positions < n, positions, 0)
        weights = (positions < n).astype(np.float32).reshape(-1, batch_size)
        if self._resident is not None:
            batches = self._gathered(indices.reshape(-1, batch_size))
        else:
            batches = self._streamed(lambda i: self._example(indices[i]), range(len(indices)), batch_size)
        for batch, weight in zip(batches, weights, strict=True):
            yield {**batch, "weight": jax.device_put(weight, self._sharding)}

    def _gathered(self, indices: Iterable[np.ndarray]) -> Iterator[Batch]:
        for batch_indices in indices:
            yield self._gather(self._resident, batch_indices)

    def _streamed(self, example: Callable[[int], Example], positions: range, batch_size: int) -> Iterator[Batch]:
        """Reads by threads, in order, and places some batches on the devices ahead."""
        ahead: collections.deque[Batch] = collections.deque()
        for batch in self._read(example, positions, batch_size):
            ahead.append(jax.device_put(batch, self._sharding))
            if len(ahead) > BATCHES_AHEAD:
                yield ahead.popleft()
        yield from ahead

    def _read(self, example: Callable[[int], Example], positions: range, batch_size: int) -> Iterator[Example]:
        dataset = grain.MapDataset.range(positions.start, positions.stop).map(example).batch(batch_size)
        batches = iter(dataset.to_iter_dataset(self._read_options))
        try:
            yield from batches
        finally:
            batches.close()

    def _read_all(self) -> Example:
        n = len(self.split)
        progress = tqdm(total=n, desc=f"reading {self.split.name}", unit=" examples", disable=None, leave=False)
        chunks = []
        for examples in self._read(self._example, range(n), 256):
            chunks.append(examples)
            progress.update(len(examples["label"]))
        progress.close()
        return {key: np.concatenate([c[key] for c in chunks]) for key in chunks[0]}

    def _example(self, index: int, random: tuple[int, int] | None = None) -> Example:
        image, label = self.split.random_view(index, *random) if random else self.split.test_view(index)
        if not 0 <= label < self.split.num_classes:
            raise UserError(
                f"{self.split.name}, example {index}: label {label}; expected 0 up to {self.split.num_classes - 1}"
            )
        return {"image": image, "label": label}
