"""A run resumed at any step, on any number of devices, has the same state, batches and following steps."""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.conftest import random_variables
from vgg_jax import VGG
from vgg_jax.config import Config, DataConfig, OptimizerConfig
from vgg_jax.data.augmentation import augment
from vgg_jax.data.loader import Loader
from vgg_jax.training.checkpoints import Checkpoints
from vgg_jax.training.inputs import augmentation, open_splits
from vgg_jax.training.optimizer import make_optimizer, make_plateau
from vgg_jax.training.sharding import AXIS
from vgg_jax.training.state import TrainState
from vgg_jax.training.step import train_step

pytestmark = pytest.mark.usefixtures("narrow")
STEPS = 20
BATCH = 16
DATA = DataConfig(dataset="digits", image_size=16, resize=16, pad=2, mean=(0.3,), std=(0.4,))
IMAGE_SHAPE = (16, 16, 1)
OPTIMIZER = OptimizerConfig(schedule="plateau", ema_decay=0.99)


def make_state(dtype):
    """Return a state with everything that a checkpoint can hold, of a network with batch norm and dropout."""
    model = VGG(
        *(11, True),
        **dict(num_classes=10, pool_size=1, hidden=(32,), pool_after=(1, 2, 3, 4), dtype=dtype, param_dtype=dtype),
    )
    variables = random_variables(model, *IMAGE_SHAPE)
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        ema=jax.tree.map(np.array, dict(variables)),
        ema_decay=OPTIMIZER.ema_decay,
        plateau=make_plateau(OPTIMIZER).init(np.float32(0)),
        tx=make_optimizer(OPTIMIZER, optax.linear_schedule(0.01, 0.001, STEPS)),
    ).replace(step=np.zeros((), np.int32))


class Trainer:
    """The step and the data on a number of devices."""

    def __init__(self, devices, data_dir):
        mesh = Mesh(np.array(jax.devices()[:devices]), (AXIS,))
        self._replicated = NamedSharding(mesh, P())
        split, _ = open_splits(Config(data=dataclasses.replace(DATA, data_dir=data_dir)))
        self._loader = Loader(split, mesh)
        view = functools.partial(augment, options=augmentation(DATA))
        self._step = jax.jit(functools.partial(train_step, augment=view))

    def place(self, state):
        return jax.device_put(state, self._replicated)

    def batches(self, start, stop=STEPS):
        return self._loader.train_batches(0, BATCH, range(start, stop))

    def step(self, state, batch):
        return self._step(state, batch, jax.random.key(1))


def saved_and_restored(state, trainer, directory, dtype="float32"):
    """Save a state, and restore it into a state with other values."""
    checkpoints = Checkpoints(str(directory))
    checkpoints.save(state, None)
    checkpoints.close()
    other = jax.tree.map(lambda a: np.full_like(a, 7), make_state(dtype))
    restored, _ = Checkpoints(str(directory)).restore(trainer.place(other))
    assert_equal(restored, state)
    shutil.rmtree(directory)
    return restored


def assert_equal(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_resumed_run_has_the_same_batches_and_states(every, data_dir, tmp_path):
    trainer = Trainer(1, data_dir)
    states, batches = [trainer.place(make_state("float32"))], list(trainer.batches(0))
    for batch in batches:
        state, metrics = trainer.step(states[-1], batch)
        assert metrics["finite"].all()
        states.append(state)
        if len(states) > 2:
            states[-3] = states[-3] if (len(states) - 3) % every == 0 else None  # to save memory
    for start in range(0, STEPS, every):
        state = saved_and_restored(states[start], trainer, tmp_path / "checkpoints")
        following = list(trainer.batches(start))
        assert_equal(following, batches[start:])
        for batch in following:
            state, _ = trainer.step(state, batch)
        assert_equal(state, states[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "steps"),
    [((2, 1), 6), ((8, 1, 4, 2), STEPS)],
    ids=["2-1", "8-1-4-2"],
)
def test_run_resumed_on_other_devices_has_the_same_losses(devices, steps, x64, data_dir, tmp_path):
    """In float32, batch norm would amplify another order of summation beyond 1e-6 within twenty steps."""
    one = Trainer(1, data_dir)
    state, losses, batches = one.place(make_state("float64")), [], list(one.batches(0, steps))
    for batch in batches:
        state, metrics = one.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == steps

    state, step = make_state("float64"), 0
    part = steps // len(devices)
    for count in devices:
        trainer = one if count == 1 else Trainer(count, data_dir)
        state = saved_and_restored(state, trainer, tmp_path / "checkpoints", "float64")
        for batch in trainer.batches(step, step + part):
            assert len(batch["image"].sharding.device_set) == count
            assert_equal(batch, batches[step])
            state, metrics = trainer.step(state, batch)
            assert float(metrics["loss"]) == pytest.approx(losses[step], rel=1e-6)
            step += 1
    assert step == steps
