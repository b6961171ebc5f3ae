"""A refused command changes no byte of the directory of a run."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from jax.sharding import Mesh

from tests.cli.test_train import command
from tests.conftest import raises_user_error
from tests.training.test_checkpoints import collected  # noqa: F401 - a fixture for all tests here
from vgg_jax import load
from vgg_jax.config import Config, DataConfig, ModelConfig
from vgg_jax.training import loop, session
from vgg_jax.training.checkpoints import Checkpoints
from vgg_jax.training.optimizer import make_optimizer, make_schedule
from vgg_jax.training.run_directory import open_run
from vgg_jax.training.run_weights import load_run
from vgg_jax.training.sharding import AXIS
from vgg_jax.training.state import create_train_state
from vgg_jax.training.validation import create_model

STEPS = 2  # the length of the finished run


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Use one of the tests' eight devices, because a restore to all takes eight times as long."""
    monkeypatch.setattr(loop, "make_mesh", lambda: Mesh(np.array(jax.devices()[:1]), (AXIS,)))


@pytest.fixture
def config(data_dir):
    return small_config(data_dir)


def small_config(data_dir):
    return Config(
        model=ModelConfig(depth=11, num_classes=10, pool_after=(1, 2, 3, 4)),
        data=DataConfig(
            **dict(dataset="digits", data_dir=data_dir, classes=(0, 1), flip=False, mean=(0.3,), std=(0.3,)),
            **dict(image_size=16, resize=16, pad=2),
        ),
        batch_size=32,
        num_epochs=STEPS / 9,
        freeze=("features",),  # halves the size of checkpoints
    )


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """Make a finished run with two checkpoints, without training."""
    config, workdir = small_config(data_dir), tmp_path_factory.mktemp("finished") / "run"
    create = functools.partial(
        create_train_state,
        model=create_model(config.model),
        optimizer=make_optimizer(config.optimizer, make_schedule(config, 288)),
        image_shape=(16, 16, 1),
        frozen=config.freeze,
    )
    state = jax.tree.map(lambda a: jnp.full(a.shape, 0.01, a.dtype), jax.eval_shape(create, jax.random.key(0)))
    with open_run(str(workdir), config) as write_config:
        write_config()
    checkpoints = Checkpoints(str(workdir / "checkpoints"))
    for step in (1, STEPS):
        checkpoints.save(state.replace(step=jnp.int32(step)), {"accuracy": 0.5, "loss": 1.0})
    checkpoints.close()
    lines = ({"kind": "train", "step": step, "loss": 1.0, "accuracy": 0.5} for step in (1, STEPS))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (workdir / "events.out.tfevents.1").write_bytes(b"events")
    return workdir


@pytest.fixture
def copy(finished, tmp_path):
    """Copy the finished run, so that a test can damage it."""
    return shutil.copytree(finished, tmp_path / "run")


def contents(directory):
    """Return the bytes of each file, and None for each directory."""
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


@contextlib.contextmanager
def unchanged(directory):
    before = contents(directory)
    yield
    after = contents(directory)
    assert [path for path in before.keys() | after.keys() if before.get(path, "") != after.get(path, "")] == []


@contextlib.contextmanager
def full_disk():
    """Limit the size of files, which stands for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def changed(config, **values):
    """Return the configuration with other values: `model__depth` is config.model.depth."""
    config = dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part)) for part in ("model", "data", "optimizer")}
    )
    for name, value in values.items():
        *parents, field = name.split("__")
        setattr(functools.reduce(getattr, parents, config), field, value)
    return config


ANOTHER_NETWORK = "belong to another network or optimizer"


@pytest.mark.parametrize(
    ("values", "allow_changes", "line"),
    [
        pytest.param(dict(seed=7), False, "config.seed is 7, was 0", id="changed"),
        pytest.param(dict(model__depth=13), True, ANOTHER_NETWORK, id="depth"),
        pytest.param(dict(model__num_classes=11), True, ANOTHER_NETWORK, id="classes"),
        pytest.param(dict(model__hidden=(8,)), True, ANOTHER_NETWORK, id="shapes"),
        pytest.param(dict(optimizer__name="adam"), True, ANOTHER_NETWORK, id="adam"),
        pytest.param(dict(optimizer__ema_decay=0.9), True, ANOTHER_NETWORK, id="ema"),
        pytest.param(dict(model__dtype="float64"), True, "is float32, expected float64", id="float64"),
        pytest.param(dict(model__num_classes=5), True, "expected at least 10", id="too_few_classes"),
        pytest.param(dict(batch_size=2000), True, "expected at most 288", id="too_large_a_batch"),
    ],
)
def test_refused_command_changes_no_byte(values, allow_changes, line, config, finished):
    try:
        with unchanged(finished), raises_user_error(line):
            loop.train_and_evaluate(changed(config, **values), str(finished), allow_changes=allow_changes)
    finally:
        jax.config.update("jax_enable_x64", False)


def test_missing_data_change_no_byte(config, finished, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # a port without a server
    config = changed(config, data__dataset="cifar10", data__data_dir=str(tmp_path / "tfds"))
    with unchanged(finished), raises_user_error(f"cifar10 is not in {tmp_path / 'tfds'}"):
        loop.train_and_evaluate(config, str(finished), allow_changes=True)


@pytest.mark.parametrize("flag", ["--wrkdir=x", "--config.batch_size=many", "--config.batch_size=0"])
def test_wrong_flag_or_value_changes_no_byte(flag, finished, data_dir, run_fork):
    with unchanged(finished):
        returncode, stderr = run_fork([*command("digits.py", finished, data_dir), flag])
    assert returncode == 2
    assert stderr.startswith("train.py: error: ")


def test_held_lock_changes_no_byte(config, finished):
    with open(finished / ".lock", "rb+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with unchanged(finished), raises_user_error("another process is training in "):
            loop.train_and_evaluate(config, str(finished))


@pytest.mark.parametrize("older", ["_CHECKPOINT_METADATA", "default/ocdbt.process_0/d/*"], ids=["metadata", "arrays"])
def test_refusal_moves_no_damaged_checkpoint(older, config, copy):
    """Damage to metadata is detected when the checkpoints are opened, damage to arrays only later."""
    checkpoints = copy / "checkpoints"
    for path in (checkpoints / str(STEPS) / "_CHECKPOINT_METADATA", *(checkpoints / "1").glob(older)):
        path.write_bytes(b"nothing")
    with unchanged(copy), raises_user_error("every checkpoint in ", "step 1: ", "step 2: "):
        loop.train_and_evaluate(config, str(copy))


def test_full_disk_changes_no_byte(config, copy, capsys):
    """A killed run has left a damaged checkpoint, and the command changes the configuration."""
    (copy / "checkpoints" / "1" / "_CHECKPOINT_METADATA").write_bytes(b"nothing")
    longer = changed(config, num_epochs=1.0, seed=3)
    with unchanged(copy), full_disk(), raises_user_error(f"cannot use the run's directory {copy}: "):
        loop.train_and_evaluate(longer, str(copy), allow_changes=True)


def test_finished_run_changes_no_byte(config, copy, capsys):
    """The command has another seed, and the lock file is missing, as in a copy of a run."""
    (copy / "checkpoints" / "1" / "_CHECKPOINT_METADATA").write_bytes(b"nothing")
    (copy / ".lock").unlink()
    with unchanged(copy):
        assert loop.train_and_evaluate(changed(config, seed=3), str(copy), allow_changes=True) == 0
    assert f"{copy} is finished: step 2 of 2" in capsys.readouterr().out


def test_run_is_usable_after_a_refusal(config, finished, tmp_path, capsys):
    with raises_user_error(ANOTHER_NETWORK):
        loop.train_and_evaluate(changed(config, model__depth=13), str(finished), allow_changes=True)
    assert loop.train_and_evaluate(config, str(finished)) == 0
    assert f"{finished} is finished: step 2 of 2" in capsys.readouterr().out
    PIL.Image.new("L", (16, 16), 128).save(tmp_path / "image.png")
    (answer,) = load(finished).predict(tmp_path / "image.png", top=1)
    assert answer.probabilities[0] == pytest.approx(0.1)


class Reached(Exception):
    """Raised after all checks of a run."""


def test_allowed_changes_are_written_after_the_checks(config, copy, monkeypatch):
    def stop(*_):
        raise Reached

    monkeypatch.setattr(session, "MetricWriter", stop)
    (copy / "checkpoints" / "2" / "_CHECKPOINT_METADATA").write_bytes(b"nothing")
    with pytest.raises(Reached):
        loop.train_and_evaluate(changed(config, seed=3, model__dtype="auto"), str(copy), allow_changes=True)
    written = json.loads((copy / "config.json").read_text())
    assert (written["seed"], written["model"]["dtype"]) == (3, "float32")
    assert os.listdir(copy / "checkpoints-corrupt") == ["2"]


@pytest.mark.parametrize("values", [{}, dict(init_from="missing.pth")], ids=["full_disk", "no_weights"])
def test_refused_new_run_leaves_no_directory(values, config, tmp_path, capsys):
    with full_disk(), raises_user_error("missing.pth does not exist" if values else "cannot use the run's directory"):
        loop.train_and_evaluate(changed(config, **values), str(tmp_path / "runs" / "new"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("depth", "line"),
    [
        (13, "belongs to another network than config.json: batch_stats/bn1_2/mean is missing, expected (64,)"),
        (15, "model.depth is 15; expected"),
    ],
)
def test_run_with_a_foreign_config_is_not_loaded(depth, line, config, copy):
    (copy / "config.json").write_text(json.dumps(dataclasses.asdict(changed(config, model__depth=depth))))
    with raises_user_error(line):
        load_run(copy)
