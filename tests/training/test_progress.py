"""A run resumed with another batch size or length continues at the same epoch, with the right learning rate."""

import dataclasses
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from tests.cli.test_train import saved_arrays
from tests.narrow import NARROW_TABLE
from vgg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from vgg_jax.data.loader import Loader
from vgg_jax.training import loop, session
from vgg_jax.training.checkpoints import Checkpoints
from vgg_jax.training.metric_writer import read_metrics
from vgg_jax.training.optimizer import at_update, make_optimizer, make_schedule, schedule_count
from vgg_jax.training.sharding import AXIS

EXAMPLES = 288  # the zeros and ones of the digits: 9 steps of 32


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    """Use narrow networks on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vgg_jax.model.TABLE_1", NARROW_TABLE)
        patch.setattr(loop, "make_mesh", lambda: Mesh(np.array(jax.devices()[:1]), (AXIS,)))
        yield


@pytest.fixture(scope="module")
def config(data_dir):
    """Two epochs of nine steps."""
    return Config(
        model=ModelConfig(depth=11, batch_norm=False, pool_after=(1, 2, 3, 4)),
        data=DataConfig(
            **dict(dataset="digits", data_dir=data_dir, classes=(0, 1), flip=False, mean=(0.3,), std=(0.3,)),
            **dict(image_size=16, resize=16, pad=2),
        ),
        optimizer=OptimizerConfig(learning_rate=0.01, reference_batch_size=32),
        batch_size=32,
        num_epochs=2,
        log_every_steps=1,
        freeze=("features",),  # compiles faster
    )


def train(config, workdir, stop=None, **changes):
    """Train, and stop after a step if one is given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.StopSignals, "received_before", lambda _, step: signal.SIGTERM if step == stop else None)
        code = loop.train_and_evaluate(dataclasses.replace(config, **changes), str(workdir), allow_changes=True)
    assert code == (0 if stop is None else 128 + signal.SIGTERM)


@pytest.fixture(scope="module")
def stopped_half_way(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("half") / "run"
    train(config, workdir, stop=9)
    return workdir


@pytest.fixture
def half(stopped_half_way, tmp_path):
    """Return the directory of a run that has stopped after one of two epochs."""
    return shutil.copytree(stopped_half_way, tmp_path / "half")


@pytest.fixture
def steps_read(monkeypatch):
    """Return the list of the (step size, first step, end, micro-batches) that each run has read."""
    read, original = [], Loader.train_inputs

    def train_inputs(self, seed, step_size, steps, accumulation_steps=1, lengths=None):
        read.append((step_size, steps.start, steps.stop, accumulation_steps))
        return original(self, seed, step_size, steps, accumulation_steps, lengths)

    monkeypatch.setattr(Loader, "train_inputs", train_inputs)
    return read


def rates(workdir):
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "train"]
    return (
        [line["step"] for line in lines],
        [line["epoch"] for line in lines],
        [line["learning_rate"] for line in lines],
    )


def schedule(config, *updates):
    return [float(make_schedule(config, EXAMPLES)(update)) for update in updates]


def test_larger_batch_resumes_at_the_same_epoch(config, half, steps_read, capsys):
    """Three steps of three times the batch, at three times the learning rate, are left."""
    new = dataclasses.replace(config, batch_size=96)
    train(new, half)
    output = capsys.readouterr().out.splitlines()
    assert (
        "resuming at epoch 1.00 of 2 (288 examples), step 9 of 12: batch size 32 -> 96; learning rate 0.005 -> 0.015"
    ) in output
    assert any(line.startswith("finished: step 12") for line in output)
    assert steps_read == [(96, 3, 6, 1)]
    steps, epochs, learning_rates = rates(half)
    assert steps == list(range(1, 13))
    assert epochs[8:] == [1.0, 1.3333, 1.6667, 2.0]
    assert learning_rates == [*schedule(config, *range(9)), *schedule(new, 3, 4, 5)]
    assert saved_arrays(half)["['opt_state'][2][1]['count']"] == 6
    train(new, half)
    assert f"{half} is finished: step 12 of 12; raise --config.num_epochs to train longer" in capsys.readouterr().out


def test_changed_run_stops_and_resumes_with_the_same_bits(config, tmp_path, capsys):
    """The change begins gradient accumulation in the middle of an epoch; the second stop is inside a batch."""
    adam = OptimizerConfig(name="adam", learning_rate=0.001, ema_decay=0.9)
    old = dataclasses.replace(config, optimizer=adam)
    new = dataclasses.replace(old, batch_size=64, accumulation_steps=4)
    train(old, tmp_path / "whole", stop=5)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    capsys.readouterr()
    train(new, tmp_path / "stopped", stop=12)
    line = "resuming at epoch 0.50 of 2 (160 examples), step 5 of 29: batch size 32 -> 64; micro-batches 1 -> 4; "
    assert line in capsys.readouterr().out
    train(new, tmp_path / "stopped")
    train(new, tmp_path / "whole")
    expected, actual = saved_arrays(tmp_path / "whole"), saved_arrays(tmp_path / "stopped")
    assert expected.keys() == actual.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(actual[path], array, err_msg=path)
    assert expected["['opt_state']['inner_opt_state'][2][1]['count']"] == 8
    assert rates(tmp_path / "whole") == rates(tmp_path / "stopped")


def test_incomplete_batch_is_repeated_with_other_micro_batches(config, steps_read, tmp_path, capsys):
    train(config, tmp_path / "run", accumulation_steps=4, stop=18)  # two of the four micro-batches of the fifth batch
    train(config, tmp_path / "run", stop=20)
    line = "resuming at epoch 0.44 of 2 (144 examples), step 18 of 32: micro-batches 4 -> 1\n"
    assert line in capsys.readouterr().out
    assert steps_read == [(8, 0, 72, 4), (32, 4, 18, 1)]
    assert saved_arrays(tmp_path / "run")["['opt_state'][2][1]['count']"] == 6


def test_longer_run_says_how_the_learning_rate_jumps(config, half, steps_read, capsys):
    longer = dataclasses.replace(config, num_epochs=4)
    train(longer, half, stop=10)
    line = "resuming at epoch 1.00 of 4 (288 examples), step 9 of 36: epochs 2 -> 4; learning rate 0.005 -> 0.008536"
    assert line in capsys.readouterr().out.splitlines()
    assert steps_read == [(32, 9, 36, 1)]
    assert rates(half)[2][-1:] == schedule(longer, 9)


def test_checkpoint_without_a_position_counts_by_its_config(config, half, steps_read, monkeypatch, capsys):
    restore = Checkpoints.restore

    def without_position(self, state):
        state, saved = restore(self, state)
        return state, {name: value for name, value in saved.items() if name != "position"}

    monkeypatch.setattr(Checkpoints, "restore", without_position)
    train(config, half, batch_size=96, stop=10)
    assert "batch size 32 -> 96; learning rate 0.005 -> 0.015" in capsys.readouterr().out
    assert steps_read == [(96, 3, 6, 1)]


@pytest.mark.parametrize(("name", "accumulation_steps"), [("sgd", 1), ("adam", 1), ("sgd", 2)])
@pytest.mark.parametrize(("kind", "warmup_epochs"), [("step", 0.0), ("cosine", 0.0), ("cosine", 1.0), ("plateau", 1.0)])
def test_moved_schedule_gives_the_rate_of_its_new_update(name, accumulation_steps, kind, warmup_epochs):
    """The momentum, the moments and the count of Adam's bias correction stay."""
    config = Config(
        optimizer=OptimizerConfig(name, schedule=kind, step_epochs=(1.5,), warmup_epochs=warmup_epochs),
        **dict(batch_size=32, accumulation_steps=accumulation_steps, num_epochs=2),
    )
    rate = make_schedule(config, EXAMPLES)
    params = {"fc8": {"kernel": jnp.array([1.0, -2.0])}}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def update(optimizer, state):
        updates = None
        for gradient in ([0.5, 1.0], [2.0, 0.1])[-accumulation_steps:]:
            updates, state = optimizer.update({"fc8": {"kernel": jnp.array(gradient)}}, state, params)
        return updates, state

    optimizer = make_optimizer(config.optimizer, rate, accumulation_steps)
    state = jax.device_put(optimizer.init(params), here)
    for _ in range(3):
        _, state = update(optimizer, state)
    assert schedule_count(state) == 3
    moved = at_update(state, 14, jax.tree.map(lambda _: here, state))
    assert schedule_count(moved) == 14
    actual, _ = update(optimizer, moved)
    shifted = make_optimizer(config.optimizer, lambda count: rate(count + 11), accumulation_steps)
    expected, _ = update(shifted, state)
    np.testing.assert_array_equal(actual["fc8"]["kernel"], expected["fc8"]["kernel"])
    assert np.abs(actual["fc8"]["kernel"]).min() > 0


def test_accumulated_gradients_are_dropped_by_a_move():
    optimizer = make_optimizer(OptimizerConfig(), optax.constant_schedule(0.1), 2)
    params = {"fc8": {"kernel": jnp.ones(2)}}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    _, state = optimizer.update(params, jax.device_put(optimizer.init(params), here), params)
    moved = at_update(state, 0, jax.tree.map(lambda _: here, state))
    assert (int(state.mini_step), int(moved.mini_step)) == (1, 0)
    assert not moved.acc_grads["fc8"]["kernel"].any()
