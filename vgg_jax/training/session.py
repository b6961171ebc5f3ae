"""A run in progress: it opens or resumes the run's directory, then takes steps, evaluates, reports and saves."""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vgg_jax.console import log, note, working
from vgg_jax.errors import UserError
from vgg_jax.runtime import return_freed_memory
from vgg_jax.training.blocks import best_length
from vgg_jax.training.cached_features import with_cached_features
from vgg_jax.training.chance import diagnosis
from vgg_jax.training.checkpoints import Checkpoints, saved_steps
from vgg_jax.training.class_names import carried
from vgg_jax.training.comparison import compare_checkpoints, compare_start
from vgg_jax.training.compilation import Compilation, Programs
from vgg_jax.training.early_stopping import EarlyStopping
from vgg_jax.training.initialization import source_variables
from vgg_jax.training.memory import explains_out_of_memory, run_memory
from vgg_jax.training.metric_writer import MetricWriter, NoMetricWriter, format_metric
from vgg_jax.training.metrics import MetricAverages, NotFiniteError, evaluation_error, split_off_classes
from vgg_jax.training.processes import StopSignals
from vgg_jax.training.profile import Profile
from vgg_jax.training.progress import Progress, restore
from vgg_jax.training.run import Run
from vgg_jax.training.run_directory import flat_fields, open_run
from vgg_jax.training.run_weights import best_evaluation
from vgg_jax.training.speed import peak_flops, training_flops
from vgg_jax.training.state import TrainState
from vgg_jax.training.step import checked_tensors, evaluate
from vgg_jax.training.trackers import Tracker
from vgg_jax.training.whitening import patch_axes

QUEUE = 3  # results of programs that an accelerator has ahead of their reader


@dataclasses.dataclass
class Session:
    """A run in progress: its state, and what its steps, reports, evaluations and saves need."""

    run: Run
    workdir: str
    state: TrainState
    progress: Progress
    blocks: Iterator[tuple[range, Any]]  # the steps of a program, and its inputs
    programs: Programs
    averages: MetricAverages
    checkpoints: Checkpoints
    writer: MetricWriter | NoMetricWriter
    stop: StopSignals
    profile: Profile
    memory: dict[str, int]  # the result of `run_memory`, for messages; whole after the first report
    stopping: EarlyStopping
    train_loss: float | None = None  # the mean of the last report
    memory_is_reported: bool = False

    def take_steps(self, steps: range, inputs: Any) -> None:
        """Advance the state by the steps of one program, and wait for the save that has to be complete by now."""
        self.profile.before(steps[0])
        with jax.profiler.StepTraceAnnotation("train", step_num=steps[-1]):
            self.state, metrics = self.programs.train_steps[len(steps)](self.state, inputs, self.run.step_key)
        # On a CPU, a step dispatched early allocates its temporary memory early, and the cores are busy anyway.
        if jax.default_backend() == "cpu":
            jax.block_until_ready((self.state, metrics))
        self.profile.after(steps[-1], metrics)
        self.averages.add(steps[-1], metrics)
        # If a save is due, the one before must be complete before this step is reported. So a kill undoes less than
        # two intervals.
        self.checkpoints.check(wait=self.progress.is_due(steps[-1], self.run.checkpoint_every))

    def signal_within(self, steps: range) -> int | None:
        """Return the signal that stops all processes after these steps, or None."""
        return next((signal for signal in map(self.stop.received_before, steps) if signal is not None), None)

    def log_averages(self, step: int) -> None:
        """Report the averages of the steps since the last report."""
        means = self.averages.report()
        self.train_loss = means["loss"]
        skipped = self.averages.skipped
        means["learning_rate"] = self.progress.learning_rate(step, skipped, self._rate_scale)
        self.writer.train(step, self.run.config.step_size, means | ({"skipped": skipped} if skipped else {}))
        self.report_memory(step)

    def start_clock(self) -> None:
        """Measure from now on; on an accelerator, report the memory first, because nothing is compiled any more."""
        if jax.default_backend() == "cpu":
            self.memory.update(run_memory(self._longest_program, None, self.state))
            self.writer.restart_clock(self.progress.start)
        else:
            self.report_memory(self.progress.start)

    @property
    def _longest_program(self) -> jax.stages.Compiled:
        return self.programs.train_steps[max(self.programs.train_steps)]

    def report_memory(self, step: int) -> None:
        """Report the memory of the run once. It needs the evaluation step, which may still be compiling."""
        if self.memory_is_reported:
            return
        self.memory_is_reported = True
        return_freed_memory()
        if memory := run_memory(self._longest_program, self.programs.eval_step.result(), self.state):
            self.memory.update(memory)
            self.writer.memory(memory)
        self.writer.restart_clock(step)

    def evaluate(self, step: int) -> dict[str, float | int]:
        """Evaluate the state, report the result, and update the plateau schedule with it."""
        self.report_memory(step)
        return_freed_memory()
        batches = self.writer.eval_batches(step, self.run.eval_loader, self.run.config.eval_batch_size)
        evaluation = evaluate(functools.partial(self.programs.eval_step.result(), self.state), batches)
        return_freed_memory()
        accuracies = split_off_classes(evaluation, self.run.class_names)
        self.writer.evaluation(step, evaluation)
        if accuracies:
            self.writer.class_accuracy(step, accuracies)
        self.stopping.update(step, evaluation)
        if self.run.config.loss == "softmax" and self.progress.is_first_evaluation(step):
            self._diagnose(evaluation)
        if self.run.plateau:
            update = jax.jit(self.run.plateau.update, out_shardings=NamedSharding(self.run.mesh, P()))
            _, after = update({}, self.state.plateau, value=evaluation_error(evaluation))
            self.state = self.state.replace(plateau=after)
        return evaluation

    def _diagnose(self, evaluation: dict[str, float | int]) -> None:
        """Name remedies if the network guesses after its first epoch."""
        loss = self.averages.loss if self.train_loss is None else self.train_loss
        if loss is not None:
            line = diagnosis(self.run.config, loss, evaluation["accuracy"], int(evaluation["count"]))
            if line:
                log(line)

    def save(self, step: int, evaluation: dict[str, float | int] | None, leaving: bool) -> None:
        """Start to save a checkpoint of the state, with its evaluation if there is one."""
        self.report_memory(step)
        progress = self.averages.state() | self.stopping.state() | carried(self.run.config)
        progress["position"] = self.progress.saved(step, self.averages.skipped, self._rate_scale)
        # A state that no finite step has followed may be the cause. Such a state is saved only at the end.
        if leaving or not self.averages.in_a_row:
            self.checkpoints.save(self.state, evaluation, progress)

    @property
    def _rate_scale(self) -> float:
        return float(jax.device_get(self.state.rate_scale))

    def finish(self, step: int, signal: int | None) -> int:
        """Complete saves and reports, and return the exit code; `signal` is the one that has stopped the run."""
        directory = os.path.join(self.workdir, "checkpoints")
        self.checkpoints.close()
        self.writer.close()
        if signal is None:
            if self.stopping.is_over:
                log(self.stopping.line())
            best = best_evaluation(directory)
            metric = self.run.config.metric
            named = f"best: step {best[0]}, {format_metric(metric, best[1][metric])} (--step best); " if best else ""
            log(f"finished: step {step}; {named}see {os.path.join(self.workdir, 'curves.png')}")
            return 0
        saved = "saved" if saved_steps(directory)[-1:] == [step] else "not saved"
        log(f"stopped at step {step} ({saved}); rerun the same command to resume from the last checkpoint")
        return 128 + signal


def open_session(
    run: Run,
    workdir: str,
    summary: bool,
    allow_changes: bool,
    stack: contextlib.ExitStack,
    trackers: Sequence[Tracker] = (),
) -> Session | None:
    """Lock the run's directory, start or resume the run and compile its steps; return None for a finished run."""
    config, directory = run.config, os.path.join(workdir, "checkpoints")
    needed = stack.enter_context(explains_out_of_memory(config))
    write_config = stack.enter_context(open_run(workdir, config, allow_changes))
    steps_saved = saved_steps(directory)  # not before the lock: another run might save
    compare_checkpoints(directory, steps_saved)
    source = _read_source(run) if config.init_from and not steps_saved else None
    if not config.cache_features:
        _ = run.train_loader, run.eval_loader  # may read all the data; the lock comes first
    _describe(run, summary)
    stop = stack.enter_context(StopSignals())
    log(f"{len(run.train_split):,} training and {len(run.eval_split):,} evaluation images; {run.num_steps:,} steps")
    # Until the checkpoints are checked and restored, a refusal leaves the directory as it was.
    checkpoints, state, progress, changes = Checkpoints(directory), None, Progress(run), ""
    saved: dict[str, Any] = {}
    if checkpoints.latest_step is not None:
        state, progress, saved, changes = restore(run, checkpoints, workdir)
        changes = f"resuming from the checkpoint of step {progress.start} in {workdir}\n{changes}".strip()
    compare_start(progress.start)
    stopping = EarlyStopping.of_run(config, saved)
    if _is_finished(workdir, progress, stopping):
        return None
    profile = Profile(workdir, config.profiled_steps, progress.start, progress.last_step)
    stack.callback(profile.close)
    write_config()
    checkpoints.open()
    if config.cache_features:
        run, state = with_cached_features(run, state or _new_state(run, source))
    length = _block_length(run)
    lengths = progress.lengths(length, profile.bounds)
    compilation, state = _compile(run, lengths, state, source)
    if changes:
        log(changes)
    writer = _open_writer(run, workdir, progress, trackers)
    stack.callback(writer.release)  # before a message about the end of the run
    queue = 1 if jax.default_backend() == "cpu" else QUEUE
    averages = MetricAverages(checked_tensors(state), config.max_skipped_steps, saved, config.metric, queue)
    blocks = _start_reading(run, progress, length, profile.bounds, stack)
    stack.enter_context(_names_last_good(checkpoints))
    with working("compiling the steps of training"):
        programs = compilation.result()
    stop.await_them()
    return_freed_memory()
    session = Session(
        *(run, workdir, state, progress, blocks, programs, averages, checkpoints, writer, stop, profile, needed),
        stopping,
    )
    session.start_clock()
    return session


def _is_finished(workdir: str, progress: Progress, stopping: EarlyStopping) -> bool:
    """Return whether the run has nothing left to do, and log the reason."""
    start, end = progress.start, progress.last_step
    if stopping.is_over:
        log(f"{workdir} is finished: {stopping.line()}; raise --config.early_stopping_patience to train longer")
    elif start >= end:
        log(f"{workdir} is finished: step {start} of {end}; raise --config.num_epochs to train longer")
    return stopping.is_over or start >= end


def _compile(
    run: Run, lengths: Collection[int], state: TrainState | None, source: Any
) -> tuple[Compilation, TrainState]:
    """Start to compile the programs of a run; return them with the state, which is made meanwhile if there is none."""
    if state is not None:
        with working("lowering the steps of training"):
            return Compilation(run, lengths), state
    axes = patch_axes(run) if run.config.whitening else None
    with working("lowering the initialization and the steps of training"):
        new_state, compilation = run.start_state(source, axes), Compilation(run, lengths)
    with working("initializing the network"):
        return compilation, new_state.result()


def _new_state(run: Run, source: Any) -> TrainState:
    """Return the state at step 0."""
    with working("initializing the network"):
        return run.new_state(source, patch_axes(run) if run.config.whitening else None)


def _start_reading(
    run: Run, progress: Progress, length: int, bounds: Collection[int], stack: contextlib.ExitStack
) -> Iterator[tuple[range, Any]]:
    """Read the first inputs, and return the steps of each program with its inputs."""
    blocks, same_blocks = itertools.tee(progress.blocks(length, bounds))
    steps = range(progress.start + progress.offset, run.num_steps)
    order = run.config.seed, run.config.step_size, steps, run.config.accumulation_steps
    read = run.train_loader.train_inputs(*order, lengths=map(len, same_blocks))
    stack.enter_context(contextlib.closing(read))
    with working("reading the first batch"):
        inputs = itertools.chain(iter([next(read)]), read)  # the iterator of a list forgets the list at its end
    return zip(blocks, inputs, strict=False)


def _open_writer(
    run: Run, workdir: str, progress: Progress, trackers: Sequence[Tracker]
) -> MetricWriter | NoMetricWriter:
    """Return the writer of this process's reports."""
    if jax.process_index():
        return NoMetricWriter()
    config, device = run.config, run.mesh.devices.flat[0].device_kind
    size, _, channels = run.image_shape
    return MetricWriter(
        *(workdir, progress.start, progress.last_step, run.steps_per_epoch, progress.offset),
        training_flops(run.model, size, channels, run.model.layers_with_parameters(config.freeze), run.cached_layers),
        run.mesh.size * peak_flops(device, config.model.dtype, float(config.peak_tflops)),
        *(trackers, flat_fields(config)),
    )


def _block_length(run: Run) -> int:
    """Return the steps of a block; 1 takes each step by itself."""
    asked = run.config.steps_per_dispatch
    if not run.train_loader.is_resident:
        # The host would have to read and stack the batches of a block before its first step.
        if asked > 1:
            note(f"config.steps_per_dispatch={asked} needs resident data; these are streamed: 1 step for each dispatch")
        return 1
    return asked or (1 if jax.default_backend() == "cpu" else best_length(run.num_steps, run.periods))


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
    device = run.mesh.devices.flat[0].device_kind
    log(f"VGG-{run.model.depth} with {parameters} on {run.mesh.size} {device} device(s)")


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
