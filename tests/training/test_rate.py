"""The learning rate as a number equals optax's schedule in the training step."""

import jax
import numpy as np
import pytest

from vgg_jax.config import SCHEDULES, Config, OptimizerConfig
from vgg_jax.training.optimizer import make_schedule
from vgg_jax.training.rate import make_rate

EXAMPLES, UPDATES = 1437, 176


def make_config(schedule, warmup_epochs=0.0, accumulation_steps=1):
    epochs = (0.5, 2.0, 2.01, 3.0)  # two of them round to the same update
    optimizer = OptimizerConfig(schedule=schedule, warmup_epochs=warmup_epochs, step_epochs=epochs, step_factor=0.2)
    return Config(optimizer=optimizer, batch_size=32, accumulation_steps=accumulation_steps, num_epochs=4)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("warmup_epochs", [0.0, 1.5])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rate_equals_the_schedule_of_optax(schedule, warmup_epochs, accumulation_steps):
    config = make_config(schedule, warmup_epochs, accumulation_steps)
    rate, updates = make_rate(config, EXAMPLES), np.arange(UPDATES + 20)
    expected = jax.vmap(make_schedule(config, EXAMPLES))(updates) * np.ones(len(updates))
    np.testing.assert_allclose([rate(int(u)) for u in updates], expected, rtol=0, atol=2e-7 * config.learning_rate)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rate_runs_no_program(schedule):
    config = make_config(schedule, 1.5)
    rate, of_optax = make_rate(config, EXAMPLES), make_schedule(config, EXAMPLES)
    with jax.transfer_guard("disallow"):
        assert [type(rate(update)) for update in (0, 100)] == [float, float]
        with pytest.raises(RuntimeError, match="Disallowed host-to-device transfer"):
            of_optax(100)  # its constants would go to the devices
