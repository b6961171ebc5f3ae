"""What a run needs: its data, its network, the layout of its state and its jitted steps."""

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from vgg_jax.config import Config
from vgg_jax.data.dataset import Split
from vgg_jax.data.loader import Loader, whole_batch
from vgg_jax.model import VGG
from vgg_jax.training.class_names import output_names
from vgg_jax.training.inputs import make_loader
from vgg_jax.training.jitting import Steps
from vgg_jax.training.rate import Rate
from vgg_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run needs: its data, its network, the layout of its state and its jitted steps."""

    config: Config  # its dtype and its classes are resolved
    mesh: Mesh
    train_split: Split
    eval_split: Split
    model: VGG
    rate: Rate  # the learning rate as a function of the update
    plateau: optax.GradientTransformationExtraArgs | None  # reduces that rate; None for the other schedules
    init: Callable[..., TrainState]  # from a key, and `source` and `axes` if any, to the state at step 0
    init_key: jax.Array
    step_key: jax.Array
    shapes: TrainState  # of jax.ShapeDtypeStruct
    shardings: TrainState  # of NamedSharding
    steps: Steps
    class_weights: tuple[float, ...] = ()  # in the training loss; () if all are equal
    cached_layers: tuple[str, ...] = ()  # the layers with parameters whose output is cached

    @property
    def train_step(self) -> Any:
        """Return the jitted step of training."""
        return self.steps.train_step

    @property
    def train_steps(self) -> Any:
        """Return the jitted program of several steps of training."""
        return self.steps.train_steps

    @property
    def eval_step(self) -> Any:
        """Return the jitted step of evaluation."""
        return self.steps.eval_step

    @property
    def eval_batch_size(self) -> int:
        """Return the size of the batches of evaluation."""
        return whole_batch(self.config.eval_batch_size, len(self.eval_split), self.mesh.size)

    @functools.cached_property
    def train_loader(self) -> Loader:
        """Return the loader of the training split; the first access may read the whole split into memory."""
        return make_loader(self.train_split, self.mesh, self.config.data, training=True)

    @functools.cached_property
    def eval_loader(self) -> Loader:
        """Return the loader of the evaluation split; the first access may read the whole split into memory."""
        return make_loader(self.eval_split, self.mesh, self.config.data)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return a name for each output, or its number if the data have no class names."""
        names = output_names(self.config.data.class_names, self.model.num_classes)
        return names or tuple(map(str, range(self.model.num_classes or 0)))

    @property
    def steps_per_epoch(self) -> int:
        """Return the steps of an epoch."""
        return self.config.steps_per_epoch(len(self.train_split))

    @property
    def num_steps(self) -> int:
        """Return the steps of the whole run."""
        return self.config.num_steps(len(self.train_split))

    @property
    def eval_every(self) -> int:
        """Return the steps from one evaluation to the next."""
        return max(1, round(self.config.eval_every_epochs * self.steps_per_epoch))

    @property
    def checkpoint_every(self) -> int:
        """Return the steps from one checkpoint to the next."""
        return max(1, round(self.config.checkpoint_every_epochs * self.steps_per_epoch))

    @property
    def log_every(self) -> int:
        """Return the steps from one report to the next."""
        return min(self.config.log_every_steps, self.steps_per_epoch)

    @property
    def periods(self) -> set[int]:
        """Return the steps from one event between two steps to the next of its kind; the ends of epochs are events."""
        return {self.log_every, self.eval_every, self.checkpoint_every, self.steps_per_epoch}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return the shape (H, W, C) of an image."""
        return (self.config.data.image_size, self.config.data.image_size, self.train_split.channels)

    def new_state(self, source: Any = None, axes: Any = None) -> TrainState:
        """Return the state at step 0 on its devices.

        Args:
          source: the variables that layers are taken from, if any.
          axes: the principal axes that the first convolution starts from, if any; see `whitening.patch_axes`.
        """
        return self.start_state(source, axes).result()

    def start_state(self, source: Any = None, axes: Any = None) -> Future[TrainState]:
        """Compile and run the program of `new_state` in a thread, and return its future."""
        # This program runs once. With fewer passes XLA:CPU compiles it in a fifth of the time.
        options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
        init = jax.jit(self.init, out_shardings=self.shardings, compiler_options=options)
        lowered = init.lower(self.init_key, source=source, axes=axes)

        def made() -> TrainState:
            state: TrainState = lowered.compile()(self.init_key, source=source, axes=axes)
            return state

        thread = ThreadPoolExecutor(max_workers=1)
        state = thread.submit(made)
        thread.shutdown(wait=False)  # the thread ends with its work
        return state
