"""Batches of a split on the devices: from memory of the devices, or read and decoded by threads of the host."""

import collections
import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from vgg_jax.console import Bar
from vgg_jax.data.dataset import CorruptImageError, Split
from vgg_jax.data.processors import num_processors
from vgg_jax.data.resident import gather, gathered
from vgg_jax.data.sampler import Order
from vgg_jax.data.slots import Slots
from vgg_jax.errors import UserError, require

Batch = dict[str, jax.Array]  # image (N, H, W, C) uint8, label (N,) int32 or (N, K) float32; in evaluation weight (N,)
Example = dict[str, Any]  # the same entries of one example, or of a part of a batch on the host

RESIDENT_BYTES = 2**31  # a split up to this size is replicated on the devices
BATCHES_AHEAD = 2  # batches placed on the devices before they are needed
ROWS_PER_TASK = 8  # most examples of one task of a thread: Grain takes 0.15 ms of the interpreter for each task
MAX_CORRUPT_IMAGES = 100  # that each process may skip


class Loader:
    """Batches of one split, sharded over all axes of the mesh.

    A resident split is decoded once and replicated on the devices. Other splits are decoded by threads while the
    devices work; each process decodes only the examples of its own devices. Both ways give the same batches.

    Close the generators that the methods return if you do not read them to the end: this stops the threads.
    """

    def __init__(
        self,
        split: Split,
        mesh: Mesh,
        *,
        resident: bool | None = None,
        num_threads: int = 0,
        skip_corrupt: bool = False,
        alternating_flip: bool = False,
        balanced: bool = False,
    ) -> None:
        """Read a resident split, or prepare to read the split batch by batch.

        Args:
          split: the split.
          mesh: the devices.
          resident: whether to replicate the split on the devices; by default if its views are not drawn by the host
            and take at most `RESIDENT_BYTES`.
          num_threads: threads that read and decode; with 0, as many as the process may use processors.
          skip_corrupt: whether to skip images that cannot be decoded; otherwise they raise UserError.
          alternating_flip: whether to flip each training image horizontally in every other epoch.
          balanced: whether training draws each class equally often.

        Raises:
          UserError: if an example of a resident split cannot be read.
        """
        self.split = split
        self._skip_corrupt, self._alternating_flip = skip_corrupt, alternating_flip
        self._labels = split.labels if balanced else None
        self._num_threads = num_threads or num_processors()
        self._corrupt: set[int] = set()
        self._sharding = NamedSharding(mesh, P(*mesh.axis_names))
        if resident is None:
            resident = not split.random_views and len(split) * split.view_bytes <= RESIDENT_BYTES
        replicated = NamedSharding(mesh, P())
        self._resident = self._place(self._read_all(), replicated) if resident else None
        self._gather = jax.jit(gathered, out_shardings=self._sharding)
        self._gather_weighted = jax.jit(_gather_weighted, out_shardings=self._sharding)

    def train_batches(
        self, seed: int, step_size: int, steps: range, accumulation_steps: int = 1
    ) -> Generator[Batch, None, None]:
        """Return the batches of some training steps; each batch is a pure function of (seed, step).

        Args:
          seed: seed of the order and of the views.
          step_size: examples of a step.
          steps: numbers of the steps.
          accumulation_steps: steps (micro-batches) of a batch.

        Returns:
          A generator of batches with `image` (step_size, H, W, C) uint8 and `label`, (step_size,) int32 or
          (step_size, K) float32.

        Raises:
          UserError: during iteration, if an example cannot be read.
        """
        inputs = self.train_inputs(seed, step_size, steps, accumulation_steps)
        return inputs if self._resident is None else (self._gather(rows) for rows in inputs)

    def train_inputs(
        self,
        seed: int,
        step_size: int,
        steps: range,
        accumulation_steps: int = 1,
        lengths: Iterable[int] | None = None,
    ) -> Generator[dict[str, Any], None, None]:
        """Return what the training steps take: rows of a resident split, which they gather themselves, or batches.

        Args:
          seed: as in `train_batches`, like the next three.
          step_size: examples of a step.
          steps: numbers of the steps.
          accumulation_steps: steps (micro-batches) of a batch.
          lengths: the numbers of steps that share an item, in order; by default 1 for each. Only a resident split has
            other lengths.

        Returns:
          A generator. For a resident split each item holds `resident`, the arrays of the whole split, the `indices` of
          the examples, (step_size,) int32, and with alternating flips `flipped`, (step_size,) bool. An item of several
          steps has one more axis in front. Other splits give the batches of `train_batches`.

        Raises:
          UserError: during iteration, if an example cannot be read.
        """
        n, flips = len(self.split), self._alternating_flip
        # The threads ask for each row.
        order = functools.lru_cache(4)(Order(seed, step_size, n, accumulation_steps, flips, self._labels).__call__)
        if self._resident is not None:
            return self._rows(map(order, steps), itertools.repeat(1) if lengths is None else lengths)

        def example(step: int, row: int) -> Example:
            indices, flipped = order(step)
            index = int(indices[row])
            while True:
                try:
                    if self.split.random_views:
                        image, label = self.split.random_view(index, seed, step * step_size + row)
                    else:
                        image, label = self.split.test_view(index)
                    return {"image": image[:, ::-1] if flipped[row] else image, "label": label}
                except CorruptImageError as error:
                    self._skip(index, error)
                    index = (index + 1) % n

        return self._streamed(example, steps, step_size)

    def _rows(
        self, order: Iterator[tuple[np.ndarray, np.ndarray]], lengths: Iterable[int]
    ) -> Generator[dict[str, Any], None, None]:
        """Yield the inputs of the training steps of a resident split."""
        for length in lengths:
            steps = [(self._readable_ones(indices), flipped) for indices, flipped in itertools.islice(order, length)]
            if not steps:
                return
            indices, flipped = (np.stack(rows) if length > 1 else rows[0] for rows in zip(*steps, strict=True))
            rows = {"indices": indices.astype(np.int32), **({"flipped": flipped} if self._alternating_flip else {})}
            yield {"resident": self._resident_views, **{name: self._place_rows(array) for name, array in rows.items()}}

    @property
    def _resident_views(self) -> Batch:
        assert self._resident is not None  # for mypy
        return {name: self._resident[name] for name in ("image", "label")}

    @property
    def is_resident(self) -> bool:
        """Return whether the split is replicated on the devices."""
        return self._resident is not None

    def train_shapes(self, step_size: int, length: int = 1) -> dict[str, Any]:
        """Return an item of `train_inputs` with shapes instead of its rows; it keeps the arrays of a resident split.

        Args:
          step_size: examples of a step.
          length: the number of steps that share the item.
        """
        if self._resident is None:
            return self._shapes_of_views(step_size)
        several = () if length == 1 else (length,)
        row_types = {"indices": np.int32} | ({"flipped": np.bool_} if self._alternating_flip else {})
        struct = functools.partial(jax.ShapeDtypeStruct, sharding=self._sharding_of_rows(1 + len(several)))
        rows = {name: struct((*several, step_size), dtype) for name, dtype in row_types.items()}
        return {"resident": self._resident_views, **rows}

    def _sharding_of_rows(self, ndim: int) -> NamedSharding:
        return NamedSharding(self._sharding.mesh, P(*(None,) * (ndim - 1), self._sharding.mesh.axis_names))

    def _place_rows(self, rows: np.ndarray) -> jax.Array:
        """Place an array that every process has, with its last axis sharded."""
        sharding = self._sharding_of_rows(rows.ndim)
        places = sharding.addressable_devices_indices_map(rows.shape).items()
        parts = [jax.device_put(rows[index], device) for device, index in places]
        return jax.make_array_from_single_device_arrays(rows.shape, sharding, parts)

    def eval_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes, dtypes and shardings of the batches of `eval_batches`."""
        n = self._eval_batch_size(batch_size)
        weight = jax.ShapeDtypeStruct((n,), np.float32, sharding=self._sharding)
        return {**self._shapes_of_views(n), "weight": weight}

    def _shapes_of_views(self, n: int) -> dict[str, jax.ShapeDtypeStruct]:
        struct = functools.partial(jax.ShapeDtypeStruct, sharding=self._sharding)
        label = struct((n, *self.split.label_shape), np.float32 if self.split.label_shape else np.int32)
        return {"image": struct((n, *self.split.view_shape), self.split.view_dtype), "label": label}

    def _eval_batch_size(self, batch_size: int) -> int:
        return whole_batch(batch_size, len(self.split), self._sharding.mesh.size)

    def num_eval_batches(self, batch_size: int) -> int:
        """Return the number of batches of `eval_batches`."""
        return -(-len(self.split) // self._eval_batch_size(batch_size))

    def eval_batches(self, batch_size: int) -> Generator[Batch, None, None]:
        """Yield every example once, in order; examples of weight 0 fill up the last batch.

        Args:
          batch_size: examples of a batch; rounded up to a multiple of the number of devices.

        Yields:
          Batches with `image` (N, H, W, C) uint8, `label` (N,) int32 or (N, K) float32, and `weight` (N,) float32, 0
          or 1.

        Raises:
          UserError: if an example cannot be read.
        """
        steps = range(self.num_eval_batches(batch_size))
        n, batch_size = len(self.split), self._eval_batch_size(batch_size)
        if self._resident is not None:
            for positions in np.arange(len(steps) * batch_size).reshape(-1, batch_size):
                counts = positions < n
                indices = np.where(counts, positions, 0)
                yield self._gather_weighted(self._resident, indices, counts.astype(np.float32))
            return

        def example(step: int, row: int) -> Example:
            position = step * batch_size + row
            return self._weighted(position) if position < n else {**self._weighted(0), "weight": np.float32(0)}

        yield from self._streamed(example, steps, batch_size)

    def _streamed(
        self, example: Callable[[int, int], Example], steps: range, batch_size: int
    ) -> Generator[Batch, None, None]:
        """Yield the batches of `example(step, row)`, read by threads and placed on the devices some batches ahead."""
        slices = self._sharding.addressable_devices_indices_map((batch_size,)).values()
        rows = np.unique(np.concatenate([np.arange(batch_size)[s] for s in slices if s]))  # of this process
        ahead: collections.deque[Batch] = collections.deque()
        count = len(steps) * len(rows)
        with contextlib.closing(
            self._read(lambda i: example(steps[i // len(rows)], int(rows[i % len(rows)])), count, len(rows))
        ) as batches:
            for batch in batches:
                ahead.append(self._place(batch, self._sharding, batch_size))
                if len(ahead) > BATCHES_AHEAD:
                    yield ahead.popleft()
        yield from ahead

    def _place(self, arrays: Example, sharding: NamedSharding, size: int | None = None) -> Batch:
        """Place this process's rows on its devices.

        Args:
          arrays: the rows of this process.
          sharding: the sharding of the result.
          size: rows of the result over all processes; by default as many as `arrays` has.
        """

        def place(array: np.ndarray) -> jax.Array:
            make: Callable[..., jax.Array] = jax.make_array_from_process_local_data
            return make(sharding, array, (size or len(array), *array.shape[1:]))

        return {name: place(array) for name, array in arrays.items()}

    def _read(self, example: Callable[[int], Example], count: int, batch_size: int) -> Generator[Example, None, None]:
        """Yield batches of the examples 0 to `count` - 1; the threads read at most two batches ahead."""
        grain = require("grain", "train")
        threads = self._num_threads
        rows = max(1, min(ROWS_PER_TASK, 2 * batch_size // threads))  # fewer if some threads would have no task
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * batch_size // rows, threads))
        slots, taken = Slots(example, count, batch_size), 0
        tasks = grain.MapDataset.range(0, count, rows).map(lambda i: slots.fill(range(i, min(i + rows, count))))
        ends = iter(tasks.to_iter_dataset(options))
        try:
            for end in ends:  # in order
                while (taken + 1) * batch_size <= end or taken * batch_size < end == count:
                    yield slots.take(taken)
                    taken += 1
        finally:
            ends.close()

    def _read_all(self) -> Example:
        n = len(self.split)
        chunks = []
        with Bar(f"reading {self.split.name}", n, "examples") as bar:
            for examples in self._read(self._weighted, n, 256):
                chunks.append(examples)
                bar.update(len(examples["label"]))
        return {key: np.concatenate([c[key] for c in chunks]) for key in chunks[0]}

    def _weighted(self, index: int) -> Example:
        """Return the test view with weight 1, or zeros with weight 0 for a corrupt image that may be skipped."""
        try:
            image, label = self.split.test_view(index)
            return {"image": image, "label": label, "weight": np.float32(1)}
        except CorruptImageError as error:
            self._skip(index, error)
            image = np.zeros(self.split.view_shape, self.split.view_dtype)
            shape = self.split.label_shape
            label = np.zeros(shape, np.float32) if shape else np.int32(0)
            return {"image": image, "label": label, "weight": np.float32(0)}

    def _readable_ones(self, indices: np.ndarray) -> np.ndarray:
        """Return the indices with those of corrupt images replaced."""
        return np.array([self._readable(int(i)) for i in indices]) if self._corrupt else indices

    def _readable(self, index: int) -> int:
        """Return the index, or that of the next image that is not corrupt."""
        while index in self._corrupt:
            index = (index + 1) % len(self.split)
        return index

    def _skip(self, index: int, error: CorruptImageError) -> None:
        """Count a corrupt image; raise UserError if it may not be skipped."""
        if not self._skip_corrupt:
            raise UserError(f"{error}; replace it, or skip such images with --config.data.corrupt_images=skip")
        if index not in self._corrupt:
            self._corrupt.add(index)
            tqdm.write(f"skipped corrupt image {len(self._corrupt)}: {error}", file=sys.stderr)  # by any process
        most = min(MAX_CORRUPT_IMAGES, len(self.split) - 1)
        if len(self._corrupt) > most:
            raise UserError(
                f"{self.split.name} has more than {most} corrupt images; replace them; the last one: {error}"
            )


def whole_batch(batch_size: int, num_examples: int, devices: int) -> int:
    """Return the size of evaluation batches: at most the examples, rounded up to a multiple of the devices."""
    return -(-min(batch_size, num_examples) // devices) * devices


def _gather_weighted(data: Batch, indices: jax.Array, counts: jax.Array) -> Batch:
    """Return rows of the data with their weights multiplied by `counts`, (N,) of 0 or 1; see `resident.gather`."""
    taken = gather(data, indices)
    return {**taken, "weight": taken["weight"] * counts}
