"""The training loop: `build` makes what a run needs, `train_and_evaluate` trains with it."""

import contextlib
import functools
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from vgg_jax.config import Config
from vgg_jax.data.augmentation import normalize
from vgg_jax.training.class_names import resolve_classes
from vgg_jax.training.comparison import compare_runs
from vgg_jax.training.inputs import class_weights, open_splits, training_view
from vgg_jax.training.jitting import jit_steps
from vgg_jax.training.optimizer import layer_rates, make_optimizer, make_plateau, make_schedule
from vgg_jax.training.rate import make_rate
from vgg_jax.training.run import Run
from vgg_jax.training.run_directory import keep_num_classes, resolve_dtype
from vgg_jax.training.session import open_session
from vgg_jax.training.sharding import make_mesh, replicate, state_shardings, with_sharded_head
from vgg_jax.training.state import create_train_state
from vgg_jax.training.trackers import Tracker
from vgg_jax.training.validation import check_data, create_model


def build(config: Config, mesh: Mesh) -> Run:
    """Open the data, create the network and jit the steps of a run; write nothing.

    Args:
      config: the configuration, accepted by `validation.check_config`, after `run_directory.resolve_dtype`.
      mesh: the devices, from `sharding.make_mesh`.

    Returns:
      The data, the network and the jitted steps of the run.

    Raises:
      UserError: if data are missing, or do not fit the configuration or the number of devices.
    """
    train_split, eval_split = open_splits(config)
    config = resolve_classes(config, train_split)
    check_data(config, train_split, eval_split, mesh.size)
    model = create_model(config.model, mesh.size)
    if config.shard_head:
        model = with_sharded_head(model, mesh)
    rates = layer_rates(config.optimizer.rates, model)
    schedule, plateau = make_schedule(config, len(train_split)), make_plateau(config.optimizer)
    init = functools.partial(
        create_train_state,
        model=model,
        optimizer=make_optimizer(config.optimizer, schedule, config.accumulation_steps, rates),
        image_shape=(config.data.image_size, config.data.image_size, train_split.channels),
        source_layers=config.init_layers,
        frozen=config.freeze,
        plateau=plateau,
        ema_decay=config.optimizer.ema_decay,
    )
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    shapes = jax.eval_shape(init, init_key)
    shardings = state_shardings(shapes, mesh, config.shard_head)
    test_view = functools.partial(normalize, mean=config.data.mean, std=config.data.std)
    weights = class_weights(config, train_split)
    steps = jit_steps(config, mesh, shardings, training_view(config), test_view, weights)
    return Run(
        *(config, mesh, train_split, eval_split, model, make_rate(config, len(train_split)), plateau, init, init_key),
        *(replicate(step_key, mesh), shapes, shardings, steps, weights),
    )


def train_and_evaluate(
    config: Config,
    workdir: str,
    summary: bool = False,
    allow_changes: bool = False,
    trackers: Sequence[Tracker] = (),
) -> int:
    """Train as `config` describes, or resume the run in `workdir`.

    Args:
      config: the configuration, accepted by `validation.check_config`. Its dtype decides whether JAX is in 64-bit mode.
      workdir: the directory of the run.
      summary: print the table of the network's layers before training.
      allow_changes: resume with a configuration that differs from that of the run so far.
      trackers: trackers that receive each report, besides `metrics.jsonl` and TensorBoard.

    Returns:
      The exit code: 0 for a finished run, 128 plus its number for one that a signal has stopped.

    Raises:
      UserError: if the data, the directory or its checkpoints cannot be used, or too many steps are not finite.
    """
    config = keep_num_classes(resolve_dtype(config, workdir), workdir)
    jax.config.update("jax_enable_x64", config.model.dtype == "float64")
    run = build(config, make_mesh())
    compare_runs(run.config, run.train_split, run.eval_split)
    with contextlib.ExitStack() as stack:
        session = open_session(run, workdir, summary, allow_changes, stack, trackers)
        if session is None:
            return 0
        progress = session.progress
        for steps, inputs in session.blocks:  # of one step on a CPU; nothing is due before the last step of a block
            session.take_steps(steps, inputs)
            signal = session.signal_within(steps)
            step = steps[-1]
            last = step == progress.last_step
            if progress.is_due(step, run.log_every) or last:
                session.log_averages(step)
            session.writer.step(step)
            evaluation = None
            if progress.is_due(step, run.eval_every) or last:
                evaluation = session.evaluate(step)
                last = last or session.stopping.is_over
            leaving = last or signal is not None
            if progress.is_due(step, run.checkpoint_every) or leaving:
                session.save(step, evaluation, leaving)
            if leaving:
                break
        return session.finish(step, None if last else signal)
