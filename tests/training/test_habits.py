"""Mixing, erasing, class weights, balanced sampling and rates by layer together: exact resumption, and refusals."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.conftest import raises_user_error
from tests.training.test_resume import BATCH, DATA, OPTIMIZER, assert_equal, make_state
from vgg_jax.config import Config, OptimizerConfig
from vgg_jax.data.loader import Loader
from vgg_jax.training.checkpoints import Checkpoints
from vgg_jax.training.inputs import class_weights, open_splits, training_view
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.sharding import AXIS
from vgg_jax.training.step import train_step
from vgg_jax.training.validation import check_config, check_data

STEPS = 6


def make_config(data_dir, **fields):
    data = dataclasses.replace(DATA, data_dir=data_dir, erasing=0.5, balanced=True, classes=(0, 1, 2, 5))
    config = Config(data=data, mixup=0.4, cutmix=1.0, class_weights="1,2,1,1,1,3,1,1,1,1", label_smoothing=0.1)
    config.model = dataclasses.replace(config.model, num_classes=10)
    return dataclasses.replace(config, **fields)


@pytest.fixture
def habits(data_dir):
    """Return the function that makes a state, the batches from a step on, and the jitted step."""
    config = make_config(data_dir)
    mesh = Mesh(np.array(jax.devices()[:1]), (AXIS,))
    split, _ = open_splits(config)
    loader = Loader(split, mesh, balanced=True)
    weights = class_weights(config, split)
    step = functools.partial(train_step, augment=training_view(config), label_smoothing=0.1, class_weights=weights)
    tx = make_optimizer(OPTIMIZER, optax.linear_schedule(0.01, 0.001, STEPS), rates={"fc8": 0.5, "conv1_1": 0.1})

    def start():
        state = make_state("float32")
        return jax.device_put(state.replace(tx=tx, opt_state=tx.init(state.params)), NamedSharding(mesh, P()))

    return start, lambda first: loader.train_batches(0, BATCH, range(first, STEPS)), jax.jit(step)


@pytest.mark.parametrize("firsts", [(3,), pytest.param(range(1, STEPS), marks=pytest.mark.slow)], ids=["3", "all"])
def test_habits_resume_bit_for_bit_at_every_step(firsts, habits, narrow, tmp_path):
    start, batches, step = habits
    key, states = jax.random.key(1), [start()]
    for batch in batches(0):
        state, metrics = step(states[-1], batch, key)
        assert metrics["finite"].all()
        states.append(state)
    for first in firsts:
        checkpoints = Checkpoints(str(tmp_path / str(first)))
        checkpoints.save(states[first], None)
        checkpoints.close()
        state, _ = Checkpoints(str(tmp_path / str(first))).restore(start())
        for batch in batches(first):
            state, _ = step(state, batch, key)
        assert_equal(state, states[-1])


def test_balanced_weights_come_from_the_selected_images(data_dir):
    config = make_config(data_dir, class_weights="balanced")
    weights = class_weights(config, open_splits(config)[0])
    assert [label for label, weight in enumerate(weights) if weight] == [0, 1, 2, 5]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"mixup": -1.0}, "config.mixup is -1.0; expected 0 or more"),
        ({"mixup": 0.2, "batch_size": 1}, "config.mixup is 0.2; expected 0, because a step has one image and no pair"),
        ({"cutmix": 1.0, "loss": "squared_error"}, "expected 0, because config.loss is squared_error: the area"),
        ({"class_weights": "1,0"}, "config.class_weights is '1,0'; expected balanced, or a number of more than 0"),
        ({"class_weights": "even"}, "config.class_weights is 'even'; expected balanced, or a number"),
        ({"class_weights": "balanced", "loss": "sigmoid"}, 'expected "", because config.loss is sigmoid'),
        ({"per_class_accuracy": True, "loss": "squared_error"}, "config.per_class_accuracy is True; expected False"),
        ({"early_stopping_min_delta": 0.1}, "expected 0, because config.early_stopping_patience is 0"),
        ({"early_stopping_patience": -1}, "config.early_stopping_patience is -1; expected 0 or more"),
        ({"init_step": "best"}, "config.init_step is 'best'; expected latest, because config.init_from is empty"),
    ],
)
def test_habits_that_make_no_sense_are_refused(fields, line):
    with raises_user_error(line):
        check_config(dataclasses.replace(Config(), **fields))


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"erasing": 1.5}, "config.data.erasing is 1.5; expected 0 up to 1"),
        ({"erasing_area": (0.4, 0.2)}, "config.data.erasing_area is (0.4, 0.2); expected two rising parts"),
        ({"erasing_aspect": (0.0, 2.0)}, "expected two rising ratios, more than 0"),
        (
            {"balanced": True, "alternating_flip": True},
            "config.data.alternating_flip needs each image once in an epoch",
        ),
    ],
)
def test_data_habits_that_make_no_sense_are_refused(fields, line):
    config = Config()
    config.data = dataclasses.replace(config.data, **fields)
    with raises_user_error(line):
        check_config(config)


def test_balanced_sampling_excludes_balanced_weights():
    config = Config(class_weights="balanced")
    config.data.balanced = True
    with raises_user_error("because config.data.balanced already draws each class equally often"):
        check_config(config)


def test_number_of_class_weights_must_fit_the_data(data_dir):
    config = make_config(data_dir, class_weights="1,2", optimizer=OptimizerConfig())
    config.batch_size = 8
    with raises_user_error("config.class_weights is '1,2'; expected 10 numbers, one for each class of digits/train"):
        check_data(config, *open_splits(config), 1)
