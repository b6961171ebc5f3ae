"""Checkpoints: what is restored is what was saved, and the right ones are kept."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vgg_jax.checkpoint import Checkpoints
from vgg_jax.training import TrainState


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


def test_a_save_holds_the_state_of_its_moment_although_the_next_step_overwrites_it(tmp_path):
    """Saves go on in the background while the donated buffers are written again."""
    checkpoints = Checkpoints(str(tmp_path))
    advance = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)
    state = make_state(1)
    for _ in range(4):
        saved = jax.tree.map(np.array, state)
        checkpoints.save(state, None)
        for _ in range(3):
            state = advance(state)
    checkpoints.close()
    assert_equal_states(Checkpoints(str(tmp_path)).restore(make_state()), saved)


def test_the_two_latest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    assert checkpoints.latest_step is None
    for step, accuracy in ((10, 0.5), (20, 0.9), (30, 0.7), (40, 0.8), (50, 0.6)):
        checkpoints.save(make_state(step), {"accuracy": accuracy, "loss": 1.0})
    checkpoints.save(make_state(60), None)
    checkpoints.save(make_state(60), None)  # saved already: nothing happens
    checkpoints.close()
    assert sorted(int(name) for name in os.listdir(tmp_path)) == [20, 50, 60]
    again = Checkpoints(str(tmp_path))
    assert again.latest_step == 60
    assert_equal_states(again.restore(make_state()), make_state(60))


def test_a_partial_save_is_cleaned_and_the_one_before_it_restored(tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    for step in (10, 20):
        checkpoints.save(make_state(step), None)
    checkpoints.close()
    os.rename(tmp_path / "20", tmp_path / "20.orbax-checkpoint-tmp")  # what a kill during the save leaves
    checkpoints = Checkpoints(str(tmp_path))
    assert checkpoints.latest_step == 10
    assert_equal_states(checkpoints.restore(make_state()), make_state(10))
    assert os.listdir(tmp_path) == ["10"]
