"""The host pipeline: which examples make up a batch, and how they reach the devices."""

import collections
import contextlib
import functools
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from vgg_jax.data.order import alternating_flips, train_indices
from vgg_jax.data.sources import CorruptImageError, Split
from vgg_jax.errors import UserError

Batch = dict[str, jax.Array]  # image (N, H, W, C) uint8, label (N,) int32; for evaluation, weight (N,) float32
Example = dict[str, Any]  # the same of one example, or of a part of a batch on the host

RESIDENT_BYTES = 2**31  # a split up to this size lives on each device whole
BATCHES_AHEAD = 2
MOST_CORRUPT = 100  # images that each process may skip


class Loader:
    """Batches of one split, sharded over the mesh's `data` axis.

    A split whose views on the host are fixed, and that fits, is decoded once and lives on each device whole; others
    are decoded by threads while the devices work, by each process what its own devices take. Both ways give the same
    batches. Close what the methods return, where it is not read to its end: that ends the threads.
    """

    def __init__(self, split: Split, mesh: Mesh, resident: bool | None = None) -> None:
        """Opens the split; `resident` overrides the choice between the two ways.

        Raises:
          UserError: where an example of a resident split cannot be used.
        """
        self.split = split
        self._corrupt: set[int] = set()
        self._sharding = NamedSharding(mesh, P(*mesh.axis_names))
        if resident is None:
            resident = not split.random_views and len(split) * split.view_bytes <= RESIDENT_BYTES
        self._resident = self._place(self._read_all(), NamedSharding(mesh, P())) if resident else None
        self._gather = jax.jit(_take, out_shardings=self._sharding)

    def train_batches(self, seed: int, step_size: int, steps: range, parts: int = 1) -> Generator[Batch]:
        """What the given training steps take, each a pure function of (seed, step).

        Args:
          seed: of the order and the views.
          step_size: the examples of a step.
          steps: which ones.
          parts: the steps that make up a batch.

        Raises:
          UserError: while they are read, where an example cannot be used.
        """
        n = len(self.split)

        @functools.lru_cache(maxsize=4)  # the threads ask for each row
        def order(step: int) -> tuple[np.ndarray, np.ndarray]:
            """The examples of a step, and which of them the host mirrors."""
            position = (seed, step, step_size, n, parts)
            alternating = self.split.config.alternating_flip
            mirrored = alternating_flips(*position) if alternating else np.zeros(step_size, bool)
            return train_indices(*position), mirrored

        if self._resident is not None:
            return self._gathered(map(order, steps))

        def example(step: int, row: int) -> Example:
            indices, mirrored = order(step)
            index = int(indices[row])
            while True:
                try:
                    if self.split.random_views:
                        image, label = self.split.random_view(index, seed, step * step_size + row)
                    else:
                        image, label = self.split.test_view(index)
                    return {"image": image[:, ::-1] if mirrored[row] else image, "label": label}
                except CorruptImageError as error:
                    self._skip(index, error)
                    index = (index + 1) % n

        return self._streamed(example, steps, step_size)

    def _gathered(self, order: Iterable[tuple[np.ndarray, np.ndarray]]) -> Generator[Batch]:
        """The training batches of a resident split."""
        for indices, mirrored in order:
            if self._corrupt:
                indices = np.array([self._readable(i) for i in indices])
            batch = self._gather(self._resident, indices, np.ones(len(indices), np.float32), mirrored)
            yield {"image": batch["image"], "label": batch["label"]}

    def eval_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes, dtypes and shardings of the batches that `eval_batches` gives."""
        n, size = self._eval_batch_size(batch_size), self.split.config.image_size
        shapes = {"image": ((n, size, size, self.split.channels), np.uint8), "label": ((n,), np.int32)}
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharding)
            for name, (shape, dtype) in (shapes | {"weight": ((n,), np.float32)}).items()
        }

    def _eval_batch_size(self, batch_size: int) -> int:
        devices = self._sharding.mesh.size
        return -(-min(batch_size, len(self.split)) // devices) * devices

    def eval_batches(self, batch_size: int) -> Generator[Batch]:
        """Every example once, in order; the last batch is filled up with examples of weight 0.

        Raises:
          UserError: while they are read, where an example cannot be used.
        """
        n, batch_size = len(self.split), self._eval_batch_size(batch_size)
        steps = range(-(-n // batch_size))
        if self._resident is not None:
            for positions in np.arange(len(steps) * batch_size).reshape(-1, batch_size):
                counts = positions < n
                indices, mirrored = np.where(counts, positions, 0), np.zeros(batch_size, bool)
                yield self._gather(self._resident, indices, counts.astype(np.float32), mirrored)
            return

        def example(step: int, row: int) -> Example:
            position = step * batch_size + row
            return self._weighted(position) if position < n else {**self._weighted(0), "weight": np.float32(0)}

        yield from self._streamed(example, steps, batch_size)

    def _streamed(self, example: Callable[[int, int], Example], steps: range, batch_size: int) -> Generator[Batch]:
        """Reads by threads, in order, and places some batches on the devices ahead."""
        slices = self._sharding.addressable_devices_indices_map((batch_size,)).values()
        rows = np.unique(np.concatenate([np.arange(batch_size)[s] for s in slices if s]))  # of this process
        ahead: collections.deque[Batch] = collections.deque()
        positions = range(len(steps) * len(rows))
        with contextlib.closing(
            self._read(lambda i: example(steps[i // len(rows)], int(rows[i % len(rows)])), positions, len(rows))
        ) as batches:
            for batch in batches:
                ahead.append(self._place(batch, self._sharding, batch_size))
                if len(ahead) > BATCHES_AHEAD:
                    yield ahead.popleft()
        yield from ahead

    def _place(self, arrays: Example, sharding: NamedSharding, size: int | None = None) -> Batch:
        """This process's part of arrays of `size` rows, or of as many as these have, on its devices."""

        def place(array: np.ndarray) -> jax.Array:
            shape = (size or len(array), *array.shape[1:])
            return jax.make_array_from_process_local_data(sharding, array, shape)

        return jax.tree.map(place, arrays)

    def _read(self, example: Callable[[int], Example], positions: Sequence[int], batch_size: int) -> Generator[Example]:
        """Batches of the examples at these positions; the threads are ahead by two batches of examples at most."""
        threads = self.split.config.num_threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * batch_size, threads))
        batches = iter(grain.MapDataset.source(positions).map(example).to_iter_dataset(options).batch(batch_size))
        try:
            yield from batches
        finally:
            batches.close()

    def _read_all(self) -> Example:
        n = len(self.split)
        chunks = []
        with tqdm(total=n, desc=f"reading {self.split.name}", unit=" examples", disable=None, leave=False) as progress:
            for examples in self._read(self._weighted, range(n), 256):
                chunks.append(examples)
                progress.update(len(examples["label"]))
        return {key: np.concatenate([c[key] for c in chunks]) for key in chunks[0]}

    def _weighted(self, index: int) -> Example:
        """The test view with weight 1, or nothing with weight 0 where the image is corrupt and may be skipped."""
        try:
            image, label = self.split.test_view(index)
            return {"image": image, "label": label, "weight": np.float32(1)}
        except CorruptImageError as error:
            self._skip(index, error)
            size = self.split.config.image_size
            image = np.zeros((size, size, self.split.channels), np.uint8)
            return {"image": image, "label": np.int32(0), "weight": np.float32(0)}

    def _readable(self, index: int) -> int:
        """The index itself, or that of the next image that is not corrupt."""
        while index in self._corrupt:
            index = (index + 1) % len(self.split)
        return index

    def _skip(self, index: int, error: CorruptImageError) -> None:
        """Counts a corrupt image, or raises where it may not be skipped."""
        if self.split.config.corrupt_images == "fail":
            raise UserError(f"{error}; replace it, or leave such images out with --config.data.corrupt_images=skip")
        if index not in self._corrupt:
            self._corrupt.add(index)
            tqdm.write(f"skipped, the {len(self._corrupt)}. corrupt image: {error}", file=sys.stderr)  # by any process
        most = min(MOST_CORRUPT, len(self.split) - 1)
        if len(self._corrupt) > most:
            raise UserError(f"{self.split.name} has more than {most} corrupt images; replace them; the last: {error}")


def _take(data: Batch, indices: jax.Array, counts: jax.Array, mirrored: jax.Array) -> Batch:
    """Those rows of the data, each with `counts` (0 or 1) times its weight, and those images `mirrored`."""
    taken = jax.tree.map(lambda array: array[indices], data)
    image = jnp.where(mirrored[:, None, None, None], taken["image"][:, :, ::-1], taken["image"])
    return {**taken, "image": image, "weight": taken["weight"] * counts}
