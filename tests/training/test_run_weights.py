"""The network of a run: from its latest or best checkpoint, or that of a given step."""

import functools
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from tests.conftest import raises_user_error
from tests.narrow import NARROW_TABLE
from tests.training.test_refusals import small_config
from vgg_jax import load
from vgg_jax.cli import convert, evaluate, network_options, predict, style_transfer
from vgg_jax.errors import UserError
from vgg_jax.training.checkpoints import Checkpoints
from vgg_jax.training.optimizer import make_optimizer, make_schedule
from vgg_jax.training.run_directory import open_run
from vgg_jax.training.run_weights import best_evaluation
from vgg_jax.training.state import create_train_state
from vgg_jax.training.validation import create_model

ACCURACIES = {1: 0.5, 2: 0.9, 3: 0.6, 4: None, 5: 0.7}  # by step; the checkpoints of 2, 4 and 5 are kept


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vgg_jax.model.TABLE_1", NARROW_TABLE)
        yield


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """Save checkpoints whose biases of fc8 are the step."""
    config, workdir = small_config(data_dir), tmp_path_factory.mktemp("run") / "run"
    create = functools.partial(
        create_train_state,
        model=create_model(config.model),
        optimizer=make_optimizer(config.optimizer, make_schedule(config, 288)),
        image_shape=(16, 16, 1),
    )
    state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(create, jax.random.key(0)))
    with open_run(str(workdir), config) as write_config:
        write_config()
    checkpoints = Checkpoints(str(workdir / "checkpoints"))
    for step, accuracy in ACCURACIES.items():
        head = {"kernel": state.params["fc8"]["kernel"], "bias": jnp.full(10, float(step)).at[3].set(99)}
        saved = state.replace(step=jnp.int32(step), params={**state.params, "fc8": head})
        checkpoints.save(saved, None if accuracy is None else {"accuracy": accuracy, "loss": 1.0})
    checkpoints.close()
    return workdir


def step_of(net):
    return int(net.variables["params"]["fc8"]["bias"][0])


@pytest.mark.parametrize(("step", "found"), [("latest", 5), ("best", 2), ("4", 4), (2, 2)])
def test_step_selects_the_checkpoint(step, found, run):
    assert step_of(load(run, step=step)) == found
    step, metrics = best_evaluation(str(run / "checkpoints"))
    assert (step, metrics["accuracy"]) == (2, 0.9)


def test_orbax_logs_nothing(run, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        load(run)
        assert not caplog.messages
        assert logging.getLogger("absl").level == logging.WARNING


@pytest.mark.parametrize("step", ["3", "first", "-2", ""])
def test_missing_step_lists_the_saved_ones(step, run):
    with raises_user_error(f"{run} has no checkpoint of step {step}; expected 2, 4, 5, latest or best"):
        load(run, step=step)


def test_damaged_step_is_refused_and_not_replaced(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    for path in (copy / "checkpoints" / "2").glob("default/ocdbt.process_0/d/*"):
        path.write_bytes(b"nothing")
    for step in ("best", "2"):
        with raises_user_error("checkpoint of step 2 in ", " is damaged: ", "choose another step"):
            load(copy, step=step)
    (copy / "checkpoints" / "2" / "_CHECKPOINT_METADATA").write_bytes(b"nothing")
    assert step_of(load(copy, step="best")) == 5
    assert "checkpoint of step 2 in " in capsys.readouterr().err


def test_run_without_evaluations_has_no_best_step(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    for step in ("2", "5"):
        shutil.rmtree(copy / "checkpoints" / step)
    with raises_user_error("has no evaluated checkpoint; expected one for step best: use step latest"):
        load(copy, step="best")


def test_commands_use_the_checkpoint_of_the_step(run, tmp_path, monkeypatch, capsys):
    for module in (convert, predict):
        monkeypatch.setattr(module, "configure", lambda: None)
    weights, image = tmp_path / "best.safetensors", tmp_path / "image.png"
    assert convert.main([str(run), str(weights), "--step", "best"]) == 0
    assert step_of(load(weights)) == 2
    PIL.Image.new("L", (16, 16), 128).save(image)
    assert predict.main(["--weights", str(run), "--step=4", "--json", "--top=1", str(image)]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    np.testing.assert_equal(answer["predictions"][0]["class"], 3)
    assert predict.main(["--weights", str(run), "--step=3", str(image)]) == 2
    assert predict.main(["--weights", str(weights), "--step=best", str(image)]) == 2
    missing, no_run = capsys.readouterr().err.splitlines()
    assert missing.startswith(f"predict: error: {run} has no checkpoint of step 3; expected 2, 4, 5")
    assert no_run.startswith(f"predict: error: step is best, but {weights} is not the directory of a run; expected one")


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        pytest.param(convert, ["{run}", "{tmp}/a.safetensors"], id="convert"),
        pytest.param(evaluate, ["--workdir", "{run}"], id="evaluate"),
        pytest.param(predict, ["--weights", "{run}", "{tmp}/image.png"], id="predict"),
        pytest.param(style_transfer, ["a.png", "b.png", "{tmp}/c.png", "--weights", "{run}"], id="style-transfer"),
    ],
)
def test_each_command_passes_the_step_on(module, arguments, run, tmp_path, monkeypatch, capsys):
    def load(source, **options):
        raise UserError(f"{source} {options['step']}")

    monkeypatch.setattr(module, "configure", lambda: None)
    monkeypatch.setattr(network_options, "load", load)
    values = [argument.format(run=run, tmp=tmp_path) for argument in arguments]
    assert module.main([*values, "--step", "best"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {run} best")


def test_temporary_directory_that_cannot_be_made_gives_one_line(run, monkeypatch, tmp_path):
    """As on a full disk: the checkpoints are not called damaged."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with raises_user_error("cannot make a temporary directory", "free disk space, or set TMPDIR"):
        load(run)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        # The adaptive pool is traced window by window, so a damaged number would trace for hours.
        pytest.param("model", "pool_size", 2**31, "pool_size is 2147483648; expected 1 to 256", id="pool"),
        pytest.param("data", "image_size", 7, "data.image_size is 7; expected at least 16", id="image"),
    ],
)
def test_damaged_number_of_a_run_is_refused_at_once(part, field, value, message, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    config[part][field] = value
    (copy / "config.json").write_text(json.dumps(config))
    with raises_user_error(message):
        load(copy)
