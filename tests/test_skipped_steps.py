"""Steps whose numbers are not finite: undone whole, counted, and after too many the end of the run."""

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

from tests.conftest import raises_user_error, random_variables
from tests.test_train_command import NARROW, ROOT, SMALL_IMAGES, command, saved_arrays
from vgg_jax import VGG
from vgg_jax.config import OptimizerConfig
from vgg_jax.optimizer import make_optimizer
from vgg_jax.tally import NotFiniteError, Tally
from vgg_jax.training import TrainState, checked_tensors, train_step

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
def test_a_batch_that_is_not_finite_is_as_if_it_had_not_been(value, tensor, state):
    """1e25 is finite, and its square is not. Parameters, momentum, statistics and moving averages, bit for bit."""
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


def test_the_first_tensor_is_the_first_that_the_step_computes(state):
    names = checked_tensors(state)
    assert names[:2] == ["images", "batch_stats/bn1_1/mean"]
    assert names[names.index("loss") + 1].startswith("gradients/fc8/")
    assert names[-1] == "gradients/conv1_1/bias"
    assert names.index("gradients/fc8/bias") < names.index("gradients/conv5_2/kernel")
    assert names.index("gradients/bn4_1/scale") < names.index("gradients/conv4_1/kernel")
    leaves = len(jax.tree.leaves(state.batch_stats)) + len(jax.tree.leaves(state.params))
    assert len(names) == len(set(names)) == 2 + leaves


def test_a_gradient_that_is_not_finite_is_named_although_the_loss_is():
    """A square root at zero: its value is finite, and its slope is not."""

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


def test_skipped_steps_are_counted_and_left_out_of_the_means(capsys):
    tally = Tally(["images", "loss"], max_skipped=3)
    tally.add(1, metrics(2.0, True, True))
    tally.add(2, metrics(np.nan, True, False))
    tally.add(3, metrics(4.0, True, True))
    saved = json.loads(json.dumps(tally.state()))
    assert (tally.skipped, tally.in_a_row) == (1, 0)
    assert capsys.readouterr().out == "step 2 is skipped: loss is not finite\n"
    for goes_on in (tally, Tally(["images", "loss"], 3, saved)):
        goes_on.add(4, metrics(6.0, True, True))
        assert goes_on.report() == {"loss": 4.0, "accuracy": 0.5}
        assert np.isnan(goes_on.report()["loss"])
        goes_on.add(5, metrics(np.nan, False, False))
        goes_on.add(6, metrics(np.nan, True, False))
        assert goes_on.state()["in_a_row"] == 2
        again = Tally(["images", "loss"], 3, json.loads(json.dumps(goes_on.state())))
        again.add(7, metrics(np.nan, True, False))
        with pytest.raises(NotFiniteError, match="3 steps in a row were skipped, from step 5 on: images was not") as e:
            again.add(8, metrics(1.0, True, True))  # one step later: the devices need not wait
        assert (e.value.first_step, e.value.tensor) == (5, "images")


# The command, with pixels that are not numbers in the steps from sys.argv[1] to sys.argv[2].
NAN_PIXELS = """
import sys
import jax.numpy as jnp
import train
import vgg_jax.model
from tests.narrow import NARROW_TABLE

vgg_jax.model.TABLE_1 = NARROW_TABLE
first, last = int(sys.argv.pop(1)), int(sys.argv.pop(1))
step = train.train_step

def with_nan_pixels(state, batch, key, augment, **arguments):
    bad = (state.step + 1 >= first) & (state.step + 1 <= last)
    return step(state, batch, key, lambda key, images: jnp.where(bad, jnp.nan, augment(key, images)), **arguments)

train.train_step = with_nan_pixels
sys.exit(train.main(sys.argv))
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


def test_nan_pixels_once_then_for_ever(data_dir, tmp_path):
    """A non-finite step is counted and the run goes on; for ever, it stops, and the last checkpoint is finite."""
    process = run_with_nan_pixels(6, 999, tmp_path, data_dir)
    assert process.returncode == 2, process.stderr
    (error,) = process.stderr.splitlines()
    assert error == (
        "train.py: error: 4 steps in a row were skipped, from step 6 on: images was not finite; "
        "the last good checkpoint is that of step 4; see what the data hold"
    )
    skipped = [line for line in process.stdout.splitlines() if "is skipped" in line]
    assert skipped == [f"step {step} is skipped: images is not finite" for step in (6, 7, 8, 9)]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "4"]
    assert all(np.isfinite(array).all() for array in saved_arrays(tmp_path).values())

    process = run_with_nan_pixels(6, 8, tmp_path, data_dir)  # three: one less than is too many
    assert process.returncode == 0, process.stderr
    assert "going on from the checkpoint of step 4" in process.stdout
    assert "finished: step 18" in process.stdout
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = {line["step"]: line for line in lines if line["kind"] == "train"}
    assert trained[6]["loss"] > 0  # of steps 4 and 5
    assert trained[9]["loss"] > 0
    assert [trained[step].get("skipped", 0) for step in (3, 6, 9, 18)] == [0, 1, 3, 3]


def test_a_learning_rate_of_1e20_stops_with_the_step_and_the_tensor_and_no_such_state_is_kept(data_dir, tmp_path):
    fields = (*FIELDS, "optimizer.learning_rate=1e20", "optimizer.warmup_epochs=0")
    process = subprocess.run(
        command("digits.py", tmp_path, data_dir, *fields, script=NARROW),
        **dict(capture_output=True, text=True),
    )
    assert process.returncode == 2, process.stderr
    (error,) = process.stderr.splitlines()
    assert "4 steps in a row were skipped, from step 2 on: " in error
    assert "there is no good checkpoint; try a smaller learning rate" in error
    assert os.listdir(tmp_path / "checkpoints") == []


def test_what_is_not_finite_is_not_in_a_configuration():
    from vgg_jax.config import Config, DataConfig, validate

    with raises_user_error("config.data.mean is (nan,); expected finite numbers", "config.optimizer.momentum is nan"):
        validate(Config(data=DataConfig(mean=(np.nan,)), optimizer=OptimizerConfig(momentum=np.nan)))
