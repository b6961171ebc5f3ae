"""Checkpoints: restored states equal saved ones, the right ones are kept, and damage is detected."""

import gc
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from tests.conftest import raises_user_error
from vgg_jax.training.checkpoints import Checkpoints, saved_steps
from vgg_jax.training.state import TrainState


def make_state(step=0):
    params = {"conv": {"kernel": jnp.arange(4_000_000.0) + step, "bias": jnp.float32(step)}}
    state = TrainState.create(
        apply_fn=None,
        params=params,
        tx=optax.sgd(0.1, momentum=0.9),
        batch_stats={"bn": {"mean": jnp.ones(3) * step}},
        frozen_params={"fc": {"kernel": jnp.full((2, 3), step + 0.5)}},
    )
    return state.replace(step=jnp.asarray(step), opt_state=jax.tree.map(lambda a: a + 2 * step, state.opt_state))


def assert_equal_states(a, b):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def test_save_holds_the_state_before_donating_steps(tmp_path):
    """Saves run in the background while later steps overwrite the donated buffers."""
    checkpoints = Checkpoints(str(tmp_path))
    advance = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)
    state = make_state(1)
    for _ in range(4):
        saved = jax.tree.map(np.array, state)
        checkpoints.save(state, None)
        for _ in range(3):
            state = advance(state)
    checkpoints.close()
    assert_equal_states(Checkpoints(str(tmp_path)).restore(make_state())[0], saved)


def test_two_latest_and_best_checkpoint_are_kept(tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    assert checkpoints.latest_step is None
    for step, accuracy in ((10, 0.5), (20, 0.9), (30, 0.7), (40, 0.8), (50, 0.6)):
        checkpoints.save(make_state(step), {"accuracy": accuracy, "loss": 1.0})
    checkpoints.save(make_state(60), None)
    checkpoints.save(make_state(60), None)  # the step is saved already: does nothing
    checkpoints.close()
    assert sorted(int(name) for name in os.listdir(tmp_path)) == [20, 50, 60]
    again = Checkpoints(str(tmp_path))
    assert again.latest_step == 60
    assert_equal_states(again.restore(make_state())[0], make_state(60))
    again.save(make_state(70), {"accuracy": 0.8, "loss": 1.0})
    again.save(make_state(80), None)
    again.close()
    assert sorted(int(name) for name in os.listdir(tmp_path)) == [20, 70, 80]  # the best of the earlier run is kept


def test_waiting_completes_a_save(tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    for step in (1, 2, 3):
        checkpoints.save(make_state(step), None)
        checkpoints.check(wait=True)
        assert saved_steps(str(tmp_path))[-1:] == [step]
    checkpoints.close()


def test_partial_save_is_deleted_and_previous_one_restored(tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    for step in (10, 20):
        checkpoints.save(make_state(step), None)
    checkpoints.close()
    os.rename(tmp_path / "20", tmp_path / "20.orbax-checkpoint-tmp")  # as a kill during the save leaves it
    checkpoints = Checkpoints(str(tmp_path))
    assert checkpoints.latest_step == 10
    assert_equal_states(checkpoints.restore(make_state())[0], make_state(10))
    checkpoints.save(make_state(30), None)  # waits until Orbax has deleted the partial save
    checkpoints.close()
    assert sorted(os.listdir(tmp_path)) == ["10", "30"]


def small_state(step):
    params = {"conv1_1": {"kernel": jnp.arange(300.0) + step, "bias": jnp.float32(step)}}
    state = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1, momentum=0.9), batch_stats={})
    return state.replace(step=jnp.asarray(step))


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(str(directory))
    for step in (10, 20):
        checkpoints.save(small_state(step), {"accuracy": 0.5, "loss": 1.0})
    checkpoints.close()
    return directory


def damage(path, random):
    """Flip a bit, truncate or delete the file; return a description."""
    content = bytearray(path.read_bytes())
    kind = random.choice(["flip", "truncate", "delete"], p=[0.6, 0.2, 0.2])
    if kind == "delete" or not content:
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(content[: random.integers(len(content))])
    else:
        content[random.integers(len(content))] ^= 1 << random.integers(8)
        path.write_bytes(content)
    return f"{kind} {path}"


@pytest.fixture(autouse=True)
def collected():
    """Collect garbage, so that warnings from it belong to the test that made it."""
    yield
    gc.collect()


@pytest.mark.parametrize("cases", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_damaged_file_is_detected_or_harmless(cases, two_checkpoints, tmp_path, capsys):
    """After damage to a file of the latest checkpoint, the previous one is used or all arrays are as saved."""
    random = np.random.default_rng(cases)
    fallen_back = 0
    for i in range(cases):
        directory = tmp_path / str(i) / "checkpoints"
        shutil.copytree(two_checkpoints, directory)
        files = sorted(path for path in (directory / "20").rglob("*") if path.is_file())
        what = damage(files[random.integers(len(files))], random)
        capsys.readouterr()
        checkpoints = Checkpoints(str(directory))
        restored = checkpoints.restore(small_state(0))[0]
        checkpoints.open()
        step = int(restored.step)
        assert step in (10, 20), what
        assert_equal_states(restored, small_state(step))
        aside = directory.with_name("checkpoints-corrupt") / "20"
        assert aside.exists() == (step == 10), what
        if step == 10:
            assert "checkpoint of step 20 is damaged: " in capsys.readouterr().out, what
            assert os.listdir(directory) == ["10"]
            fallen_back += 1
        shutil.rmtree(directory.parent)
    assert 0 < fallen_back < cases


def test_changed_array_is_named(two_checkpoints, tmp_path, capsys):
    """Orbax restores a flipped bit silently. Here a whole array is replaced by another valid one."""
    directory = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, directory)
    other = small_state(20)
    other = other.replace(params=jax.tree.map(lambda a: a.at[..., -1:].add(1) if a.ndim else a, other.params))
    shutil.rmtree(directory / "20" / "default")
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(
        directory / "20" / "default",
        {"step": other.step, "params": other.params, "batch_stats": {}, "opt_state": other.opt_state},
    )
    checkpointer.close()
    checkpoints = Checkpoints(str(directory))
    assert int(checkpoints.restore(small_state(0))[0].step) == 10
    checkpoints.open()
    assert "step 20 is damaged: params/conv1_1/kernel failed the checksum" in capsys.readouterr().out


def test_changed_metadata_are_detected(two_checkpoints, tmp_path, capsys):
    """The changed metadata are valid JSON of the same structure."""
    directory = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, directory)
    path = directory / "20" / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    metadata["custom_metadata"]["progress"] = {"skipped": 7}
    path.write_text(json.dumps(metadata))
    checkpoints = Checkpoints(str(directory))
    assert int(checkpoints.restore(small_state(0))[0].step) == 10
    checkpoints.open()
    output = capsys.readouterr().out
    assert "step 20 is damaged: its metadata cannot be read: ValueError: failed the checksum" in output


def test_all_checkpoints_damaged_is_refused_without_changes(two_checkpoints, tmp_path):
    for files in (("_CHECKPOINT_METADATA",), ("default/manifest.ocdbt",)):
        directory = tmp_path / files[0].split("/")[0] / "checkpoints"
        shutil.copytree(two_checkpoints, directory)
        for step in ("10", "20"):
            (directory / step / files[0]).write_bytes(b"nothing")
        before = sorted(str(path) for path in directory.rglob("*"))
        with raises_user_error("every checkpoint in ", "step 20: ", "step 10: ", "another --workdir"):
            Checkpoints(str(directory)).restore(small_state(0))[0]
        assert sorted(str(path) for path in directory.rglob("*")) == before
        assert not directory.with_name("checkpoints-corrupt").exists()


@pytest.mark.parametrize("damaged", [False, True])
def test_another_structure_of_the_state_is_no_damage(damaged, tmp_path):
    """An optimizer with a mask has arrays of the same names and shapes, in a tree of another structure."""

    def state(mask):
        tx = optax.chain(optax.add_decayed_weights(0.1, mask), optax.sgd(0.1, momentum=0.9))
        state = TrainState.create(apply_fn=None, params={"conv1_1": {"bias": jnp.ones(3)}}, tx=tx, batch_stats={})
        return state.replace(step=jnp.asarray(10))

    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(state(None), None)
    checkpoints.close()
    if damaged:
        shutil.rmtree(tmp_path / "10" / "default")
    found = "is damaged" if damaged else "are intact, but belong to an optimizer of another configuration"
    with raises_user_error(str(tmp_path), found):
        Checkpoints(str(tmp_path)).restore(state({"conv1_1": {"bias": True}}))


def test_empty_directory_is_no_checkpoint(two_checkpoints, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, directory)
    (directory / "30").mkdir()
    assert int(Checkpoints(str(directory)).restore(small_state(0))[0].step) == 20
