"""What train.py makes of a configuration, for the benchmarks that time its parts."""

import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vgg_jax.config import Config, create_model
from vgg_jax.data.augmentation import augment
from vgg_jax.data.pipeline import Loader
from vgg_jax.data.sources import open_splits
from vgg_jax.optimizer import make_optimizer, make_schedule
from vgg_jax.parallel import make_mesh
from vgg_jax.run_directory import resolve_dtype
from vgg_jax.training import TrainState, compiler_options, create_train_state, train_step


class RunParts(NamedTuple):
    """The state at step 0, the jitted step, which donates it, the loader, and an epoch's number of steps."""

    state: TrainState
    step: Any
    loader: Loader
    steps_per_epoch: int


def run_parts(config: Config) -> RunParts:
    """For all of JAX's devices."""
    config, mesh = resolve_dtype(config), make_mesh()
    split, _ = open_splits(config)
    init = functools.partial(
        create_train_state,
        model=create_model(config.model),
        optimizer=make_optimizer(config.optimizer, make_schedule(config, len(split)), config.accumulation_steps),
        image_shape=(config.data.image_size, config.data.image_size, split.channels),
    )
    state = jax.jit(init, out_shardings=NamedSharding(mesh, P()))(jax.random.key(0))
    view = functools.partial(augment, config=config.data)
    step = jax.jit(functools.partial(train_step, augment=view), donate_argnums=0, compiler_options=compiler_options())
    return RunParts(state, step, Loader(split, mesh), config.steps_per_epoch(len(split)))
