"""The memory of a run."""

import subprocess
import sys

import numpy as np
import pytest

from tests.test_train_command import ROOT
from vgg_jax.memory import HostCopy, resident_bytes

pytestmark = pytest.mark.skipif(resident_bytes() is None, reason="only Linux tells what a process holds")

# Saves a state of 64 MiB after each step, which overwrites it, or only takes the steps. Prints what the process holds
# after each.
SAVES = """
import sys
import jax, jax.numpy as jnp, optax
from absl import logging
from vgg_jax.allocator import keep_freed_memory
from vgg_jax.checkpoint import Checkpoints
from vgg_jax.memory import resident_bytes
from vgg_jax.training import TrainState

logging.set_verbosity(logging.FATAL)
keep_freed_memory()
params = {f"conv{i}": {"kernel": jnp.zeros(2**20)} for i in range(8)}
state = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1, momentum=0.9), batch_stats={})
state = state.replace(step=jnp.asarray(0))
del params
step = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)
checkpoints = Checkpoints(sys.argv[1])
for _ in range(int(sys.argv[2])):
    state = jax.block_until_ready(step(state))
    if sys.argv[3] == "save":
        checkpoints.save(state, None)
    print(resident_bytes(), flush=True)
checkpoints.close()
"""
STATE = 2**26


def resident_after_each_step(*arguments):
    process = subprocess.run(
        [sys.executable, "-c", SAVES, *map(str, arguments)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return [int(line) for line in process.stdout.splitlines()]


def test_memory_is_flat_over_saves(tmp_path):
    """Two saves in a row overlap, so each step meets a save that still reads the state before it."""
    without = resident_after_each_step(tmp_path / "without", 3, "step")[-1]
    held = resident_after_each_step(tmp_path / "with", 24, "save")
    assert held[-1] < 1.05 * held[4]
    assert held[-1] - without < 1.5 * STATE


def test_a_host_copy_is_overwritten_in_place():
    """Arrays of less and of more than a page of their own, and another layout after that."""
    tree = {"small": np.arange(3), "large": np.ones((600, 500), np.float32), "none": np.zeros((0, 2), bool)}
    host_copy = HostCopy()
    first = host_copy.update(tree)
    for name, array in tree.items():
        assert not np.shares_memory(first[name], array)
        np.testing.assert_array_equal(first[name], array)
    second = host_copy.update({name: array + array for name, array in tree.items()})
    assert all(second[name] is first[name] for name in tree)
    np.testing.assert_array_equal(first["large"], tree["large"] * 2)
    np.testing.assert_array_equal(host_copy.update({"small": np.arange(4.0)})["small"], np.arange(4.0))
