"""The features of many images: named activations, pooled over positions, scales and the horizontal flip.

With `scales`, an image is treated as in appendix B of the paper: it is resized to several scales, and the network is
applied to the whole image. Its features are averaged over positions, over the image and its horizontal flip, and over
the scales. They are then divided by their L2 norm.
"""

import collections
import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import PIL.Image
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, UInt8

from vgg_jax.data.image_files import center_view
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.errors import UserError
from vgg_jax.evaluation.batch_plan import Plan, PlannedBatch, plan_scales, plan_views
from vgg_jax.evaluation.batches import AHEAD, local_mesh, replicated
from vgg_jax.evaluation.image_sources import ImageSource
from vgg_jax.evaluation.optimized import keeps_layers, optimized_on_cpu
from vgg_jax.evaluation.parts import Rows, RowStore
from vgg_jax.evaluation.pooled_features import FeatureOptions, check_options, image_features
from vgg_jax.evaluation.reading import Reader
from vgg_jax.model import VGG
from vgg_jax.runtime import compiler_options, placed

LABEL, NAME, READABLE = "label", "name", "readable"  # the arrays of a row beside its features
DEFAULT_PIXELS = 16 * 224**2  # of a batch on a device
MOST_IMAGES = 128  # of a batch on a device, by default
SMALL = 64  # views up to this side are read several at a time, because a thread's task takes as long as their decoding
TASK = 16


class Extraction:
    """The features of all images of a source, batch by batch.

    Attributes:
      key: everything that the computed rows depend on, except the weights and the images.
    """

    def __init__(
        self,
        model: VGG,
        variables: Mapping[str, Any],
        preprocessing: Preprocessing,
        source: ImageSource,
        options: FeatureOptions,
        batch_size: int | None = None,
        skip_corrupt: bool = True,
    ) -> None:
        """Check the arguments; read nothing.

        Args:
          model: the network.
          variables: its variables. Those of layers behind the deepest one named may be missing.
          preprocessing: the preprocessing of its images.
          source: the images.
          options: the choices of the features.
          batch_size: images of the network's input size that each device computes together; larger images count by
            their pixels, and horizontal flips count too. By default as many as fill 16 views of 224x224, at most 128.
          skip_corrupt: leave out images that cannot be read; otherwise they raise UserError in `compute`.

        Raises:
          UserError: if the network cannot compute the features.
        """
        check_options(model, preprocessing, options)
        self._model, self._variables, self._preprocessing = model, variables, preprocessing
        self._source, self._options = source, options
        side = preprocessing.crop
        size = batch_size or min(MOST_IMAGES, max(1, DEFAULT_PIXELS // side**2))
        self._size = size
        self._pixels = max(1, size * side**2 // (2 if options.flip else 1))
        self._mesh = local_mesh(len(source))
        task = TASK if max(options.scales, default=side) <= SMALL else 1
        self._reader = Reader(source, skip_corrupt, most_corrupt=len(source), task=task)
        self.key = {"batch size": size, "devices": self._mesh.size, "platform": jax.default_backend()}

    @functools.cached_property
    def plan(self) -> Plan:
        """Return the batches; for whole images, read each image's size."""
        count, scales = len(self._source), self._options.scales
        if not scales:
            return plan_views(count, self._preprocessing.crop, self._pixels, self._mesh.size)
        sizes = dict(self._reader.results(self._source.size, "sizes of the images"))
        return plan_scales(sizes, count, scales, self._pixels, self._mesh.size)

    def compute(self, store: RowStore) -> None:
        """Compute the rows that the store lacks, and add them to it.

        Raises:
          UserError: if no image can be read, or a data set is damaged.
        """
        missing = self.plan.missing(store.done())
        if not missing:
            return
        views = _Views(missing, self._preprocessing, self._options.scales, self._source)
        model, variables = self._model, self._variables
        if keeps_layers(model, self._options.layers):
            side, channels = self._preprocessing.crop, len(self._preprocessing.mean)
            model, variables = optimized_on_cpu(model, variables, (self._size, side, side, channels), self._mesh.size)
        program = _program(model, self._preprocessing, self._options, self.plan.padded)
        variables = replicated(variables, self._mesh)
        sharding = NamedSharding(self._mesh, P(*self._mesh.axis_names))
        running: collections.deque[tuple[PlannedBatch, Rows, dict[str, jax.Array]]] = collections.deque()

        def fetch() -> None:
            batch, rows, found = running.popleft()
            features = {layer: np.asarray(values)[: len(batch.images)] for layer, values in found.items()}
            store.add(batch.start, {**rows, **features})

        def start(batch: PlannedBatch) -> None:
            images, sizes, rows = views.take(batch)
            found = program(variables, *placed((images, sizes), sharding))
            for values in found.values():
                values.copy_to_host_async()
            running.append((batch, rows, found))
            if len(running) > AHEAD:
                fetch()

        pending = collections.deque(missing)
        indices = views.images
        done = len(self._source) - len(indices)
        try:
            for index, _ in self._reader.results(views.read, "extraction", indices, done):
                while pending and max(pending[0].images) <= index:
                    start(pending.popleft())
            while pending:
                start(pending.popleft())
            while running:
                fetch()
        finally:
            store.flush()


@functools.lru_cache(maxsize=8)
def _program(model: VGG, preprocessing: Preprocessing, options: FeatureOptions, padded: bool) -> Any:
    """Return the jitted function of `image_features`; the compiled programs of the last ones are kept."""
    function = functools.partial(image_features, model, preprocessing, options, padded)
    return jax.jit(function, compiler_options=compiler_options())


class _Views:
    """The resized images of batches, which threads write into the arrays of their batches."""

    def __init__(
        self, batches: Sequence[PlannedBatch], preprocessing: Preprocessing, scales: Sequence[int], source: ImageSource
    ) -> None:
        """Prepare to read the images of some batches.

        Args:
          batches: the batches, in the order in which they are taken.
          preprocessing: the view of an image.
          scales: the short sides of whole images; (): the test view.
          source: the images.
        """
        self._preprocessing, self._scales, self._source = preprocessing, scales, source
        self._places: dict[int, list[tuple[PlannedBatch, int]]] = collections.defaultdict(list)
        for batch in batches:
            for row, index in enumerate(batch.images):
                self._places[index].append((batch, row))
        self._arrays: dict[int, tuple[np.ndarray, np.ndarray, Rows]] = {}
        self._lock = threading.Lock()

    @property
    def images(self) -> list[int]:
        """Return the images to read, in order."""
        return sorted(self._places)

    def read(self, index: int) -> None:
        """Read an image into its places. Threads may call this at once."""
        pixels, label = self._source.pixels(index)
        name = self._source.image_name(index).encode("utf-8", "backslashreplace")
        for batch, row in self._places[index]:
            view = self._view(pixels, batch.scales[row])
            images, sizes, rows = self._allocated(batch)
            height, width = sizes[row] = view.shape[:2]
            images[row, :height, :width] = view
            rows[LABEL][row], rows[READABLE][row] = label, 1
            with self._lock:
                if len(name) > rows[NAME].dtype.itemsize:
                    rows[NAME] = rows[NAME].astype(f"S{len(name)}")
                rows[NAME][row] = name

    def _view(self, pixels: UInt8[np.ndarray, "h w c"], scale: int) -> UInt8[np.ndarray, "h2 w2 c"]:
        prepare = self._preprocessing
        if self._scales:
            image = PIL.Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
            return prepare.resized(image, self._scales[scale])
        return prepare.ordered(center_view(pixels, prepare.resize, prepare.crop))

    def _allocated(self, batch: PlannedBatch) -> tuple[np.ndarray, np.ndarray, Rows]:
        """Return the images, sizes and rows of a batch, blank until they are read."""
        with self._lock:
            if batch.start not in self._arrays:
                count, shape = len(batch.images), self._source.label_shape
                rows = {
                    LABEL: np.zeros((count, *shape), np.float32 if shape else np.int32),
                    NAME: np.zeros(count, "S32"),
                    READABLE: np.zeros(count, np.uint8),
                }
                images = np.zeros((batch.size, *batch.shape, self._source.channels), np.uint8)
                self._arrays[batch.start] = images, np.full((batch.size, 2), batch.shape, np.int32), rows
            return self._arrays[batch.start]

    def take(self, batch: PlannedBatch) -> tuple[np.ndarray, np.ndarray, Rows]:
        """Return the images, sizes and rows of a batch, and forget it."""
        self._allocated(batch)  # a batch of unreadable images is blank
        with self._lock:
            return self._arrays.pop(batch.start)


class Features:
    """The features of the readable images, read from the rows of an extraction."""

    def __init__(self, plan: Plan, store: RowStore, options: FeatureOptions) -> None:
        """Find the readable images.

        Args:
          plan: the batches of the extraction.
          store: the rows of all batches.
          options: the choices of the features.

        Raises:
          UserError: if no image could be read.
        """
        self._store, self._options = store, options
        planned = np.flatnonzero((plan.rows >= 0).all(0))
        readable = np.ones(len(planned), bool)
        for rows in plan.rows[:, planned]:
            readable &= store.gather(READABLE, rows) > 0 if len(rows) else readable
        self._rows = plan.rows[:, planned[readable]]
        self.unreadable = plan.rows.shape[1] - len(self)
        if not len(self):
            raise UserError("the parts hold no image that can be read; expected at least one: replace the files")

    def __len__(self) -> int:
        return int(self._rows.shape[1])

    def names(self) -> list[str]:
        """Return the names of the images."""
        return [name.decode() for name in self._store.gather(NAME, self._rows[0])]

    def labels(self) -> np.ndarray:
        """Return the labels of the images, (N,) int32 or (N, K) float32."""
        return self._store.gather(LABEL, self._rows[0])

    def block(self, layer: str, start: int, stop: int) -> Float[np.ndarray, "n ..."]:
        """Return the features of some images, float32, combined over scales and divided by their norms."""
        scales = [self._store.gather(layer, rows[start:stop]) for rows in self._rows]
        if self._options.combine == "stack":
            values = np.concatenate(scales, 1)
        else:
            values = functools.reduce(np.add, scales) / np.float32(len(scales))
        if self._options.normalize:
            norms = np.sqrt(np.einsum("nc,nc->n", values, values, dtype=np.float64))
            values = values / np.maximum(norms, np.finfo(np.float32).tiny)[:, None].astype(np.float32)
        return values
