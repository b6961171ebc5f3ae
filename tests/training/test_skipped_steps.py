"""Steps with values that are not finite: undone completely, counted, and after too many the end of the run."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.cli.test_train import NARROW, ROOT, SMALL_IMAGES, command, saved_arrays
from tests.conftest import raises_user_error, random_variables
from vgg_jax import VGG
from vgg_jax.config import OptimizerConfig
from vgg_jax.training.metrics import MetricAverages, NotFiniteError
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.state import TrainState
from vgg_jax.training.step import checked_tensors, train_step

IMAGE_SHAPE = (16, 16, 3)


@functools.cache
def make_state():
    model = VGG(11, True, num_classes=10, pool_size=1, hidden=(32,), pool_after=(1, 2, 3, 4))
    variables = random_variables(model, *IMAGE_SHAPE)
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        ema=dict(variables),
        ema_decay=0.9,
        tx=make_optimizer(OptimizerConfig(), optax.linear_schedule(0.01, 0.001, 5)),
    ).replace(step=jnp.asarray(0))


@pytest.fixture
def state(narrow):
    return make_state()


@functools.cache
def jitted_step():
    return jax.jit(train_step)


def make_batches():
    random = np.random.default_rng(0)
    return [
        {
            "image": random.normal(size=(8, *IMAGE_SHAPE)).astype(np.float32),
            "label": random.integers(0, 10, 8).astype(np.int32),
        }
        for _ in range(5)
    ]


def first_bad(state, metrics):
    return checked_tensors(state)[int(np.argmin(metrics["finite"]))]


@pytest.mark.parametrize(("value", "tensor"), [(np.nan, "images"), (np.inf, "images"), (1e25, "batch_stats/bn1_1/var")])
def test_nonfinite_batch_leaves_state_unchanged(value, tensor, state):
    """Parameters, momentum, statistics and moving averages agree bit for bit. 1e25 has an infinite square."""
    key, step = jax.random.key(0), jitted_step()
    batches = make_batches()
    batches[2]["image"][0, 3, 3, 1] = value
    after, expected = state, state
    for i, batch in enumerate(batches):
        after, metrics = step(after, batch, key)
        assert bool(metrics["finite"].all()) == (i != 2)
        if i == 2:
            assert first_bad(state, metrics) == tensor
            expected = expected.replace(step=expected.step + 1)
        else:
            expected, _ = step(expected, batch, key)
    assert int(after.step) == 5
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(a).all()


def test_checked_tensors_are_in_computed_order(state):
    names = checked_tensors(state)
    assert names[:2] == ["images", "batch_stats/bn1_1/mean"]
    assert names[names.index("loss") + 1].startswith("gradients/fc8/")
    assert names[-1] == "gradients/conv1_1/bias"
    assert names.index("gradients/fc8/bias") < names.index("gradients/conv5_2/kernel")
    assert names.index("gradients/bn4_1/scale") < names.index("gradients/conv4_1/kernel")
    leaves = len(jax.tree.leaves(state.batch_stats)) + len(jax.tree.leaves(state.params))
    assert len(names) == len(set(names)) == 2 + leaves


def test_nonfinite_gradient_is_named_if_the_loss_is_finite():
    """A square root at zero has a finite value and an infinite slope."""

    def apply_fn(variables, images, **_):
        conv, fc = (variables["params"][name]["kernel"] for name in ("conv1_1", "fc8"))
        return images.mean((1, 2)) * jnp.sqrt(conv) + fc, {}

    params = {"conv1_1": {"kernel": jnp.zeros(3)}, "fc8": {"kernel": jnp.ones(3)}}
    state = TrainState.create(apply_fn=apply_fn, params=params, batch_stats={}, tx=optax.sgd(0.1))
    batch = {"image": jnp.ones((2, 4, 4, 3)), "label": jnp.array([0, 1])}
    after, metrics = train_step(state, batch, jax.random.key(0))
    assert np.isfinite(metrics["loss"])
    assert first_bad(state, metrics) == "gradients/conv1_1/kernel"
    np.testing.assert_array_equal(after.params["fc8"]["kernel"], np.ones(3))


def metrics(loss, *finite):
    return {"loss": jnp.float32(loss), "accuracy": jnp.float32(0.5), "finite": jnp.array(finite)}


def test_skipped_steps_are_counted_and_excluded_from_averages(capsys):
    averages = MetricAverages(["images", "loss"], max_skipped=3)
    averages.add(1, metrics(2.0, True, True))
    averages.add(2, metrics(np.nan, True, False))
    averages.add(3, metrics(4.0, True, True))
    saved = json.loads(json.dumps(averages.state()))
    assert (averages.skipped, averages.in_a_row) == (1, 0)
    assert capsys.readouterr().out == "skipped step 2: loss is not finite\n"
    for resumed in (averages, MetricAverages(["images", "loss"], 3, saved)):
        resumed.add(4, metrics(6.0, True, True))
        assert resumed.report() == {"loss": 4.0, "accuracy": 0.5}
        assert np.isnan(resumed.report()["loss"])
        resumed.add(5, metrics(np.nan, False, False))
        resumed.add(6, metrics(np.nan, True, False))
        assert resumed.state()["in_a_row"] == 2
        again = MetricAverages(["images", "loss"], 3, json.loads(json.dumps(resumed.state())))
        again.add(7, metrics(np.nan, True, False))
        with pytest.raises(NotFiniteError, match="3 steps in a row were skipped, from step 5: images was not") as e:
            again.add(8, metrics(1.0, True, True))  # one step later, so that the devices need not wait
        assert (e.value.first_step, e.value.tensor) == (5, "images")


# The command with NaN pixels in the steps from sys.argv[1] to sys.argv[2].
NAN_PIXELS = """
import sys
import jax.numpy as jnp
import vgg_jax.model
from vgg_jax.cli import train
from vgg_jax.training import jitting
from tests.narrow import NARROW_TABLE

vgg_jax.model.TABLE_1 = NARROW_TABLE
first, last = int(sys.argv.pop(1)), int(sys.argv.pop(1))
step = jitting.train_step

def with_nan_pixels(state, batch, key, augment, **arguments):
    bad = (state.step + 1 >= first) & (state.step + 1 <= last)

    def view(key, batch):
        batch = augment(key, batch)
        return {**batch, "image": jnp.where(bad, jnp.nan, batch["image"])}

    return step(state, batch, key, view, **arguments)

jitting.train_step = with_nan_pixels
sys.exit(train.main())
"""
FIELDS = (
    *SMALL_IMAGES,
    *("model.depth=11", "data.classes=(0, 1)", "batch_size=32", "num_epochs=2", "log_every_steps=3"),
    *("checkpoint_every_epochs=0.23", "max_skipped_steps=4"),  # every two steps of nine
)


def run_with_nan_pixels(first, last, workdir, data_dir):
    _, _, *arguments = command("digits.py", workdir, data_dir, *FIELDS)
    return subprocess.run(
        [sys.executable, "-c", NAN_PIXELS, str(first), str(last), *arguments],
        **dict(capture_output=True, text=True, cwd=ROOT),
    )


@pytest.mark.slow
def test_nan_pixels_are_skipped_or_stop_the_run(data_dir, tmp_path):
    """The run stops after too many skipped steps in a row, and its last checkpoint is finite; fewer are skipped."""
    process = run_with_nan_pixels(6, 999, tmp_path, data_dir)
    assert process.returncode == 2, process.stderr
    (error,) = process.stderr.splitlines()
    assert error == (
        "train.py: error: 4 steps in a row were skipped, from step 6: images was not finite; "
        "last good checkpoint: step 4; check the images"
    )
    skipped = [line for line in process.stdout.splitlines() if line.startswith("skipped step")]
    assert skipped == [f"skipped step {step}: images is not finite" for step in (6, 7, 8, 9)]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "4"]
    assert all(np.isfinite(array).all() for array in saved_arrays(tmp_path).values())

    process = run_with_nan_pixels(6, 8, tmp_path, data_dir)  # three, one less than too many
    assert process.returncode == 0, process.stderr
    assert "resuming from the checkpoint of step 4" in process.stdout
    assert "finished: step 18" in process.stdout
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = {line["step"]: line for line in lines if line["kind"] == "train"}
    assert trained[6]["loss"] > 0  # the mean of steps 4 and 5
    assert trained[9]["loss"] > 0
    assert [trained[step].get("skipped", 0) for step in (3, 6, 9, 18)] == [0, 1, 3, 3]


def test_diverged_run_stops_and_keeps_no_checkpoint(data_dir, tmp_path):
    fields = (*FIELDS, "optimizer.learning_rate=1e20", "optimizer.warmup_epochs=0")
    process = subprocess.run(
        command("digits.py", tmp_path, data_dir, *fields, script=NARROW),
        **dict(capture_output=True, text=True),
    )
    assert process.returncode == 2, process.stderr
    (error,) = process.stderr.splitlines()
    assert "4 steps in a row were skipped, from step 2: " in error
    assert "no good checkpoint; lower the learning rate or set clip_norm" in error
    assert os.listdir(tmp_path / "checkpoints") == []


def test_nonfinite_config_values_are_refused():
    from vgg_jax.config import Config, DataConfig
    from vgg_jax.training.validation import check_config

    with raises_user_error("config.data.mean is (nan,); expected finite numbers", "config.optimizer.momentum is nan"):
        check_config(Config(data=DataConfig(mean=(np.nan,)), optimizer=OptimizerConfig(momentum=np.nan)))
