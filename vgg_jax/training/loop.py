"""The training loop: `build` makes what a run needs, `train_and_evaluate` trains with it."""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vgg_jax.config import Config
from vgg_jax.console import log
from vgg_jax.data.augmentation import augment, normalize
from vgg_jax.data.dataset import Split
from vgg_jax.data.loader import Loader
from vgg_jax.errors import UserError
from vgg_jax.model import VGG
from vgg_jax.runtime import compiler_options, return_freed_memory
from vgg_jax.training.checkpoints import Checkpoints, saved_steps
from vgg_jax.training.class_names import carried, resolve_classes
from vgg_jax.training.initialization import source_variables
from vgg_jax.training.inputs import augmentation, make_loader, open_splits
from vgg_jax.training.memory import run_memory
from vgg_jax.training.metric_writer import MetricWriter, NoMetricWriter
from vgg_jax.training.metrics import MetricAverages, NotFiniteError, evaluation_error
from vgg_jax.training.optimizer import make_optimizer, make_plateau, make_schedule
from vgg_jax.training.processes import StopSignals
from vgg_jax.training.run_directory import keep_num_classes, open_run, resolve_dtype
from vgg_jax.training.sharding import make_mesh, state_shardings, with_sharded_head, with_sharding
from vgg_jax.training.state import TrainState, create_train_state
from vgg_jax.training.step import checked_tensors, eval_step, evaluate, train_step
from vgg_jax.training.validation import check_data, create_model


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run needs: its data, its network, the layout of its state and its jitted steps."""

    config: Config  # its dtype and its classes are resolved
    mesh: Mesh
    train_split: Split
    eval_split: Split
    model: VGG
    schedule: optax.Schedule  # the learning rate as a function of the update
    plateau: optax.GradientTransformationExtraArgs | None  # reduces that rate; None for the other schedules
    init: Callable[..., TrainState]  # from a key, and the `source` of layers if any, to the state at step 0
    init_key: jax.Array
    step_key: jax.Array
    shapes: TrainState  # of jax.ShapeDtypeStruct
    shardings: TrainState  # of NamedSharding
    train_step: Any  # jitted, donates the state: from (state, batch, key) to (state, metrics)
    eval_step: Any  # jitted: from (state, batch) to sums over the batch

    @functools.cached_property
    def train_loader(self) -> Loader:
        """Return the loader of the training split; the first access may read the whole split into memory."""
        return make_loader(self.train_split, self.mesh, self.config.data)

    @functools.cached_property
    def eval_loader(self) -> Loader:
        """Return the loader of the evaluation split; the first access may read the whole split into memory."""
        return make_loader(self.eval_split, self.mesh, self.config.data)

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
    def image_shape(self) -> tuple[int, int, int]:
        """Return the shape (H, W, C) of an image."""
        return (self.config.data.image_size, self.config.data.image_size, self.train_split.channels)

    def new_state(self, source: Any = None) -> TrainState:
        """Return the state at step 0 on its devices; `source` holds the variables that layers are taken from."""
        # This program runs once. With fewer passes XLA:CPU compiles it in a fifth of the time.
        options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
        init = jax.jit(self.init, out_shardings=self.shardings, compiler_options=options)
        state: TrainState = init(self.init_key, source=source)
        return state


def build(config: Config, mesh: Mesh) -> Run:
    """Open the data, create the network and jit the steps of a run; write nothing.

    Args:
      config: the configuration, accepted by `validation.check_config`, after `run_directory.resolve_dtype`.
      mesh: the devices, from `sharding.make_mesh`.

    Raises:
      UserError: if data are missing, or do not fit the configuration or the number of devices.
    """
    train_split, eval_split = open_splits(config)
    config = resolve_classes(config, train_split)
    check_data(config, train_split, eval_split, mesh.size)
    model = create_model(config.model)
    if config.shard_head:
        model = with_sharded_head(model, mesh)
    schedule, plateau = make_schedule(config, len(train_split)), make_plateau(config.optimizer)
    init = functools.partial(
        create_train_state,
        model=model,
        optimizer=make_optimizer(config.optimizer, schedule, config.accumulation_steps),
        image_shape=(config.data.image_size, config.data.image_size, train_split.channels),
        source_layers=config.init_layers,
        frozen=config.freeze,
        plateau=plateau,
        ema_decay=config.optimizer.ema_decay,
    )
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    shapes = jax.eval_shape(init, init_key)
    shardings, replicated = state_shardings(shapes, mesh, config.shard_head), NamedSharding(mesh, P())
    jit = functools.partial(jax.jit, compiler_options=compiler_options())
    view = functools.partial(augment, options=augmentation(config.data))
    test_view = functools.partial(normalize, mean=config.data.mean, std=config.data.std)
    jit_train_step = jit(
        functools.partial(train_step, augment=view, label_smoothing=config.label_smoothing, loss=config.loss),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )
    jit_eval_step = jit(
        functools.partial(eval_step, normalize=test_view, flip=config.flip_eval, loss=config.loss),
        out_shardings=replicated,
    )
    return Run(
        *(config, mesh, train_split, eval_split, model, schedule, plateau, init, init_key, step_key),
        *(shapes, shardings, jit_train_step, jit_eval_step),
    )


def train_and_evaluate(config: Config, workdir: str, summary: bool = False, allow_changes: bool = False) -> int:
    """Train as `config` describes, or resume the run in `workdir`.

    Args:
      config: the configuration, accepted by `validation.check_config`.
      workdir: the directory of the run.
      summary: print the table of the network's layers before training.
      allow_changes: resume with a configuration that differs from that of the run so far.

    Returns:
      The exit code: 0 for a finished run, 128 plus its number for one that a signal has stopped.

    Raises:
      UserError: if the data, the directory or its checkpoints cannot be used, or too many steps are not finite.
    """
    config = keep_num_classes(resolve_dtype(config, workdir), workdir)
    jax.config.update("jax_enable_x64", config.model.dtype == "float64")
    run = build(config, make_mesh())
    with contextlib.ExitStack() as stack:
        session = _open_session(run, workdir, summary, allow_changes, stack)
        if session is None:
            return 0
        for step, batch in enumerate(session.batches, session.start + 1):
            session.take_step(step, batch)
            signal = session.stop.received_before(step)
            last = step == run.num_steps
            if step % config.log_every_steps == 0 or last:
                session.log_averages(step)
            evaluation = None
            if step % run.eval_every == 0 or last:
                evaluation = session.evaluate(step)
            leaving = last or signal is not None
            if step % run.checkpoint_every == 0 or leaving:
                session.save(evaluation, leaving)
            if leaving:
                break
        return session.finish(step, None if last else signal)


@dataclasses.dataclass
class _Session:
    """A run in progress: its state, and what its steps, reports, evaluations and saves need."""

    run: Run
    workdir: str
    state: TrainState
    start: int  # the steps taken before
    batches: Iterator[Any]
    compiled_train_step: jax.stages.Compiled
    compiled_eval_step: jax.stages.Compiled
    averages: MetricAverages
    checkpoints: Checkpoints
    writer: MetricWriter | NoMetricWriter
    stop: StopSignals

    def take_step(self, step: int, batch: Any) -> None:
        """Advance the state by one step, and wait for the save that has to be complete by now."""
        self.state, metrics = self.compiled_train_step(self.state, batch, self.run.step_key)
        # On a CPU, a step dispatched early allocates its temporary memory early, and the cores are busy anyway.
        if jax.default_backend() == "cpu":
            jax.block_until_ready((self.state, metrics))
        self.averages.add(step, metrics)
        # If a save is due, the one before must be complete before this step is reported. So a kill undoes less than
        # two intervals.
        self.checkpoints.check(wait=step % self.run.checkpoint_every == 0)

    def log_averages(self, step: int) -> None:
        """Report the averages of the steps since the last report."""
        means = self.averages.report()
        skipped = self.averages.skipped
        update = (step - 1 - skipped) // self.run.config.accumulation_steps
        rate_scale = float(jax.device_get(self.state.rate_scale))
        means["learning_rate"] = float(self.run.schedule(update)) * rate_scale
        self.writer.train(step, self.run.config.step_size, means | ({"skipped": skipped} if skipped else {}))

    def evaluate(self, step: int) -> dict[str, float | int]:
        """Evaluate the state, report the result, and update the plateau schedule with it."""
        return_freed_memory()
        batches = self.run.eval_loader.eval_batches(self.run.config.eval_batch_size)
        evaluation = evaluate(functools.partial(self.compiled_eval_step, self.state), batches)
        return_freed_memory()
        self.writer.evaluation(step, evaluation)
        if self.run.plateau:
            update = jax.jit(self.run.plateau.update, out_shardings=NamedSharding(self.run.mesh, P()))
            _, after = update({}, self.state.plateau, value=evaluation_error(evaluation))
            self.state = self.state.replace(plateau=after)
        return evaluation

    def save(self, evaluation: dict[str, float | int] | None, leaving: bool) -> None:
        """Start to save a checkpoint of the state, with its evaluation if there is one."""
        progress = self.averages.state() | carried(self.run.config)
        # A state that no finite step has followed may be the cause. Such a state is saved only at the end.
        if leaving or not self.averages.in_a_row:
            self.checkpoints.save(self.state, evaluation, progress)

    def finish(self, step: int, signal: int | None) -> int:
        """Complete saves and reports, and return the exit code; `signal` is the one that has stopped the run."""
        self.checkpoints.close()
        self.writer.close()
        if signal is None:
            log(f"finished: step {step}; see {os.path.join(self.workdir, 'curves.png')}")
            return 0
        saved = "saved" if saved_steps(os.path.join(self.workdir, "checkpoints"))[-1:] == [step] else "not saved"
        log(f"stopped at step {step} ({saved}); rerun the same command to resume from the last checkpoint")
        return 128 + signal


def _open_session(
    run: Run, workdir: str, summary: bool, allow_changes: bool, stack: contextlib.ExitStack
) -> _Session | None:
    """Lock the run's directory, start or resume the run and compile its steps; return None for a finished run."""
    config, directory = run.config, os.path.join(workdir, "checkpoints")
    source = _read_source(run) if config.init_from and not saved_steps(directory) else None
    write_config = stack.enter_context(open_run(workdir, config, allow_changes))
    _ = run.train_loader, run.eval_loader  # may read all the data; the lock comes first
    _describe(run, summary)
    stop = stack.enter_context(StopSignals())
    log(f"{len(run.train_split):,} training and {len(run.eval_split):,} evaluation images; {run.num_steps:,} steps")

    # Until the checkpoints are checked and restored, a refusal leaves the directory as it was.
    checkpoints, progress, state = Checkpoints(directory), None, None
    if checkpoints.latest_step is not None:
        state, progress = checkpoints.restore(jax.tree.map(with_sharding, run.shapes, run.shardings))
    start = 0 if state is None else int(state.step)
    if start >= run.num_steps:
        log(f"{workdir} is finished: step {start} of {run.num_steps}; raise --config.num_epochs to train longer")
        return None
    write_config()
    checkpoints.open()
    if state is None:
        state = run.new_state(source)
    else:
        log(f"resuming from the checkpoint of step {start} in {workdir}")

    is_first = jax.process_index() == 0
    writer = MetricWriter(workdir, start, run.num_steps, run.steps_per_epoch) if is_first else NoMetricWriter()
    averages = MetricAverages(checked_tensors(state), config.max_skipped_steps, progress, config.metric)
    steps = range(start, run.num_steps)
    read = run.train_loader.train_batches(config.seed, config.step_size, steps, config.accumulation_steps)
    stack.enter_context(contextlib.closing(read))
    stack.enter_context(_names_last_good(checkpoints))
    batches, compiled_train_step, compiled_eval_step = _compile(run, state, read)
    stop.await_them()
    return_freed_memory()
    if memory := run_memory(compiled_train_step, compiled_eval_step, state):
        writer.memory(start, memory)
    return _Session(
        *(run, workdir, state, start, batches, compiled_train_step, compiled_eval_step),
        *(averages, checkpoints, writer, stop),
    )


def _read_source(run: Run) -> Any:
    """Return the variables that a new run takes layers from, checked against the network."""
    source = source_variables(run.config, run.model)
    jax.eval_shape(run.init, run.init_key, source=source)
    return source


def _describe(run: Run, summary: bool) -> None:
    """Print the network, its parameters and the devices."""
    if summary:
        images = np.zeros((1, *run.image_shape), np.float32)
        log(run.model.tabulate(run.init_key, images, console_kwargs={"width": 120}))
    trees = run.shapes.variables["params"], run.shapes.params
    count, trained = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in trees)
    parameters = f"{count:,} parameters" + (f", of which {trained:,} train," if trained < count else "")
    log(f"VGG-{run.model.depth} with {parameters} on {run.mesh.size} {run.mesh.devices.flat[0].device_kind} device(s)")


def _compile(
    run: Run, state: TrainState, batches: Iterator[Any]
) -> tuple[Iterator[Any], jax.stages.Compiled, jax.stages.Compiled]:
    """Return all batches, and the two steps, compiled at the same time by two threads."""
    first_batch = next(batches)  # a local variable: the batch would otherwise live as long as the run
    eval_batch = run.eval_loader.eval_shapes(run.config.eval_batch_size)
    lowered = run.train_step.lower(state, first_batch, run.step_key), run.eval_step.lower(state, eval_batch)
    with ThreadPoolExecutor() as threads:
        compiled_train_step, compiled_eval_step = threads.map(jax.stages.Lowered.compile, lowered)
    return itertools.chain([first_batch], batches), compiled_train_step, compiled_eval_step


@contextlib.contextmanager
def _names_last_good(checkpoints: Checkpoints) -> Iterator[None]:
    """Name the last good checkpoint in the error, if too many steps in a row are skipped.

    A checkpoint of the state that these steps started from is moved aside, unless the images are the cause.
    """
    try:
        yield
    except NotFiniteError as error:
        latest = checkpoints.latest_step
        if error.tensor != "images":
            latest = checkpoints.reject_from(error.first_step - 1, "was followed by no finite step")
        checkpoints.close()
        good = "no good checkpoint" if latest is None else f"last good checkpoint: step {latest}"
        remedy = "check the images" if error.tensor == "images" else "lower the learning rate or set clip_norm"
        raise UserError(f"{error}; {good}; {remedy}") from error
