"""Trains a VGG network: python train.py --config configs/vgg16.py [--workdir DIR] [--config.FIELD=VALUE ...]

Writes to the run's directory (by default runs/NAME for configs/NAME.py): config.json, metrics.jsonl, TensorBoard
events, curves.png and checkpoints/. The same command again goes on where the last checkpoint is. SIGINT and SIGTERM
save and leave with exit code 130 and 143; a mistake in the command gives one line and exit code 2. On several machines
the command runs once for each of them, or for each of their devices: with --distributed where JAX finds the others by
itself (Slurm, Open MPI, Kubernetes, Cloud TPU), else with --coordinator HOST:PORT, --num_processes and --process_id.
"""

import contextlib
import functools
import itertools
import logging
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # else XLA speaks of each program that it takes from the cache

import jax
import numpy as np
from absl import flags
from absl import logging as absl_logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import config_flags

from vgg_jax.allocator import keep_freed_memory, return_freed_memory
from vgg_jax.checkpoint import Checkpoints, saved_steps
from vgg_jax.config import Config, check_field_name, create_model, field_names, validate
from vgg_jax.data.augmentation import augment, normalize
from vgg_jax.data.pipeline import Loader
from vgg_jax.data.sources import check_config, open_splits
from vgg_jax.errors import UserError, report_mistakes
from vgg_jax.evaluation import evaluate
from vgg_jax.memory import run_memory
from vgg_jax.optimizer import make_optimizer, make_plateau, make_schedule
from vgg_jax.parallel import make_mesh, state_shardings, with_sharded_head, with_sharding
from vgg_jax.processes import StopSignals, check_alone, joined
from vgg_jax.reporting import NoReporter, Reporter, say
from vgg_jax.run_directory import open_run, resolve_dtype
from vgg_jax.tally import NotFiniteError, Tally
from vgg_jax.training import checked_tensors, compiler_options, create_train_state, eval_step, train_step
from vgg_jax.transfer import source_variables

COMPILATION_CACHE = os.path.join("~", ".cache", "vgg_jax", "compiled")  # or the variable JAX_COMPILATION_CACHE_DIR

CONFIG = config_flags.DEFINE_config_file("config", help_string="the experiment: a file of configs/")
WORKDIR = flags.DEFINE_string("workdir", None, "the run's directory; by default runs/NAME for configs/NAME.py")
SUMMARY = flags.DEFINE_bool("summary", False, "print the table of the network's layers before training")
ALLOW_CHANGES = flags.DEFINE_bool("allow_changes", False, "go on with another configuration than the run's so far")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "this is one of several processes, which JAX finds by itself")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of the first of several processes")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many there are", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "which of them this is, from 0", lower_bound=0)


def train_and_evaluate(config: Config, workdir: str, summary: bool = False, allow_changes: bool = False) -> int:
    """Trains as `config` says, or goes on with the run in `workdir`; returns the exit code."""
    config = resolve_dtype(config, workdir)
    jax.config.update("jax_enable_x64", config.model.dtype == "float64")
    mesh = make_mesh()
    replicated = NamedSharding(mesh, P())
    train_split, eval_split = open_splits(config)
    check_config(config, train_split, eval_split, mesh.size)

    steps_per_epoch, num_steps = config.steps_per_epoch(len(train_split)), config.num_steps(len(train_split))
    eval_every, checkpoint_every = (
        max(1, round(epochs * steps_per_epoch)) for epochs in (config.eval_every_epochs, config.checkpoint_every_epochs)
    )

    model = create_model(config.model)
    if config.shard_head:
        model = with_sharded_head(model, mesh)
    schedule, plateau = make_schedule(config, len(train_split)), make_plateau(config.optimizer)
    optimizer = make_optimizer(config.optimizer, schedule, config.accumulation_steps)
    image_shape = (config.data.image_size, config.data.image_size, train_split.channels)
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    checkpoint_dir = os.path.join(workdir, "checkpoints")
    init = functools.partial(
        create_train_state,
        model=model,
        optimizer=optimizer,
        image_shape=image_shape,
        source_layers=config.init_layers,
        frozen=config.freeze,
        plateau=plateau,
        ema_decay=config.optimizer.ema_decay,
    )
    source = source_variables(config, model) if config.init_from and not saved_steps(checkpoint_dir) else None
    shapes = jax.eval_shape(init, init_key, source=source)
    shardings = state_shardings(shapes, mesh, config.shard_head)

    test_view = functools.partial(normalize, mean=config.data.mean, std=config.data.std)
    train_view = functools.partial(augment, config=config.data)
    jit_train_step = jax.jit(
        functools.partial(train_step, augment=train_view, label_smoothing=config.label_smoothing),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
        compiler_options=compiler_options(),
    )
    jit_eval_step = jax.jit(
        functools.partial(eval_step, normalize=test_view, flip=config.flip_eval),
        out_shardings=replicated,
        compiler_options=compiler_options(),
    )

    with contextlib.ExitStack() as stack:
        write_config = stack.enter_context(open_run(workdir, config, allow_changes))
        train_loader, eval_loader = (Loader(split, mesh) for split in (train_split, eval_split))
        if summary:
            say(model.tabulate(init_key, np.zeros((1, *image_shape), np.float32), console_kwargs={"width": 120}))
        count, trained = (sum(a.size for a in jax.tree.leaves(p)) for p in (shapes.variables["params"], shapes.params))
        parameters = f"{count:,} parameters" + (f", of which {trained:,} train," if trained < count else "")
        say(f"VGG-{model.depth} with {parameters} on {mesh.size} {mesh.devices[0].device_kind} device(s)")
        stop = stack.enter_context(StopSignals())
        say(f"{len(train_split):,} training and {len(eval_split):,} evaluation images; {num_steps:,} steps")

        # Until the checkpoints are checked and restored, a refusal leaves the directory as it was.
        checkpoints, progress, state = Checkpoints(checkpoint_dir), None, None
        if checkpoints.latest_step is not None:
            state, progress = checkpoints.restore(jax.tree.map(with_sharding, shapes, shardings))
        start = 0 if state is None else int(state.step)
        if start >= num_steps:
            say(f"{workdir} is finished: step {start} of {num_steps}; for more, raise --config.num_epochs")
            return 0
        write_config()
        checkpoints.open()
        if state is None:
            # The program that draws the parameters runs once: with fewer passes XLA:CPU compiles it in a fifth of the
            # time.
            options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
            state = jax.jit(init, out_shardings=shardings, compiler_options=options)(init_key, source=source)
        else:
            say(f"going on from the checkpoint of step {start} in {workdir}")

        reporter = Reporter(workdir, start, num_steps, steps_per_epoch) if jax.process_index() == 0 else NoReporter()
        tally = Tally(checked_tensors(state), config.max_skipped_steps, progress)
        steps = range(start, num_steps)
        batches = train_loader.train_batches(config.seed, config.step_size, steps, config.accumulation_steps)
        stack.enter_context(contextlib.closing(batches))
        stack.enter_context(names_last_good(checkpoints))

        first_batch = next(batches)
        eval_shapes = eval_loader.eval_shapes(config.eval_batch_size)
        lowered = jit_train_step.lower(state, first_batch, step_key), jit_eval_step.lower(state, eval_shapes)
        with ThreadPoolExecutor() as threads:
            compiled_step, compiled_eval_step = threads.map(jax.stages.Lowered.compile, lowered)
        stop.await_them()
        return_freed_memory()
        if memory := run_memory(compiled_step, compiled_eval_step, state):
            reporter.memory(start, memory)
        all_batches, on_cpu = itertools.chain([first_batch], batches), jax.default_backend() == "cpu"
        del first_batch  # or it would live as long as the run
        for step, batch in enumerate(all_batches, start + 1):
            state, metrics = compiled_step(state, batch, step_key)
            if on_cpu:  # a step dispatched early takes its temporary memory early, and the cores are busy anyway
                jax.block_until_ready((state, metrics))
            tally.add(step, metrics)
            # When a save is due, and before that step is reported, the one before has to be complete: so a kill undoes
            # less than two intervals.
            checkpoints.check(wait=step % checkpoint_every == 0)
            received = stop.received_before(step)
            leaving = step == num_steps or received is not None

            if step % config.log_every_steps == 0 or step == num_steps:
                means = tally.report()
                update = (step - 1 - tally.skipped) // config.accumulation_steps
                means["learning_rate"] = float(schedule(update)) * float(jax.device_get(state.rate_scale))
                reporter.train(step, config.step_size, means | ({"skipped": tally.skipped} if tally.skipped else {}))

            evaluation = None
            if step % eval_every == 0 or step == num_steps:
                return_freed_memory()
                eval_batches = eval_loader.eval_batches(config.eval_batch_size)
                evaluation = evaluate(functools.partial(compiled_eval_step, state), eval_batches)
                return_freed_memory()
                reporter.evaluation(step, evaluation)
                if plateau:
                    jit_update = jax.jit(plateau.update, out_shardings=replicated)
                    _, after = jit_update({}, state.plateau, value=1 - evaluation["accuracy"])
                    state = state.replace(plateau=after)

            if step % checkpoint_every == 0 or leaving:
                progress = tally.state()
                if leaving or not tally.in_a_row:  # a state from which no finite step was taken may be a bad one
                    checkpoints.save(state, evaluation, progress)
            if leaving:
                break
        checkpoints.close()
        reporter.close()
        if received is not None and step < num_steps:
            saved = "which is" if saved_steps(checkpoint_dir)[-1:] == [step] else "which is not"
            say(f"stopped at step {step}, {saved} saved; the same command goes on from the last that is")
            return 128 + received
        say(f"finished: step {step}; see {os.path.join(workdir, 'curves.png')}")
        return 0


@contextlib.contextmanager
def names_last_good(checkpoints: Checkpoints) -> Iterator[None]:
    """Where too many steps in a row are skipped within, says which checkpoint was before them.

    One of the state from which they were taken is put aside, but where the images are at fault.
    """
    try:
        yield
    except NotFiniteError as error:
        latest = checkpoints.latest_step
        if error.tensor != "images":
            latest = checkpoints.reject_from(error.first_step - 1, "was followed by no finite step")
        checkpoints.close()
        good = "there is no good checkpoint" if latest is None else f"the last good checkpoint is that of step {latest}"
        remedy = "see what the data hold" if error.tensor == "images" else "try a smaller learning rate, or clip_norm"
        raise UserError(f"{error}; {good}; {remedy}") from error


def run(config: Config, workdir: str) -> int:
    """Joins the other processes, where there are any, and trains; returns the exit code."""
    if DISTRIBUTED.value or COORDINATOR.value:
        processes: contextlib.AbstractContextManager = joined(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    else:
        if NUM_PROCESSES.value is not None or PROCESS_ID.value is not None:
            raise UserError("--coordinator is missing; expected HOST:PORT with --num_processes and --process_id")
        check_alone()
        processes = contextlib.nullcontext()
    with processes:
        return train_and_evaluate(config, workdir, SUMMARY.value, ALLOW_CHANGES.value)


def parse(argv: list[str]) -> tuple[Config, str]:
    """The configuration and the run's directory that a command line asks for.

    Raises:
      UserError: for every mistake in the command line or the values of the configuration.
    """
    path = None
    for i, argument in enumerate(argv):
        if match := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            check_field_name(match.group(1))
        elif match := re.match(r"--?config(?:=(.*))?$", argument):
            path = match.group(1) or "".join(argv[i + 1 : i + 2])
    if path is None:
        raise UserError("--config is missing; expected a file, as --config configs/digits.py")
    if not os.path.isfile(path):
        raise UserError(f"--config is {path!r}, which is not a file; expected one, as --config configs/digits.py")
    try:
        rest = flags.FLAGS(argv)[1:]
        config = CONFIG.value
    except flags.Error as error:
        first, *others = str(error).splitlines()
        # Of an error inside the file the message has the whole traceback, and the error itself in its last line.
        raise UserError(f"{path}: {others[-1]}" if others else first) from None
    except Exception as error:  # whatever the file raises
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; expected flags only: see --help")
    if not isinstance(config, Config):
        raise UserError(f"{path}: get_config() returned {type(config).__name__}; expected a vgg_jax.config.Config")
    validate(config)
    name = os.path.splitext(os.path.basename(path))[0]
    return config, WORKDIR.value or os.path.join("runs", name)


def ignore_abandoned_writes() -> None:
    """Where a save fails, Orbax leaves its other writes behind, and Python and asyncio report the end of each.

    The failure itself is raised by `Checkpoints`.
    """

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def main(argv: list[str]) -> int:
    """The command; returns its exit code."""
    if {"--help", "-h"} & set(argv):
        print(__doc__, flags.FLAGS.main_module_help(), "\nFields of the configuration:", sep="\n")
        print("\n".join(f"  --config.{name}" for name in field_names()))
        return 0
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(COMPILATION_CACHE))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs add up to a second
    keep_freed_memory()
    # On a CPU, run the steps of an evaluation in turn, as those of training.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    ignore_abandoned_writes()
    absl_logging.set_verbosity(absl_logging.FATAL)  # TFDS and Orbax log, with tracebacks, what is reported here
    return report_mistakes("train.py", lambda: run(*parse(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
