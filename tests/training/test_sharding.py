"""A sharded head: the same training, and fewer bytes sent between devices."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.scaling import compile_step, held_bytes, predicted_bytes, ring_bytes
from tests.conftest import random_variables, relative_error
from vgg_jax import VGG, load
from vgg_jax.config import OptimizerConfig
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.sharding import AXIS, state_shardings, with_sharded_head
from vgg_jax.training.state import TrainState
from vgg_jax.training.step import train_step
from vgg_jax.weights.formats import Loaded, save_file

IMAGE_SHAPE = (16, 16, 3)
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}  # rounding by another order of summation, after five steps


def mesh_of(devices):
    return Mesh(np.array(jax.devices()[:devices]), (AXIS,))


def make_state(model, dtype, batch_norm):
    # In float32, batch norm over small maps amplifies a flipped ReLU with each step: hence the smaller rate.
    rate = 0.001 if batch_norm and dtype == "float32" else 0.01
    variables = random_variables(model, *IMAGE_SHAPE)
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        head_layers=model.head_layers,
        tx=make_optimizer(OptimizerConfig(), optax.constant_schedule(rate)),
    )


@functools.cache
def train(devices, sharded, batch_norm, dtype):
    """Return the state after five steps with dropout on the devices."""
    mesh = mesh_of(devices)
    model = VGG(
        11,
        num_classes=16,
        pool_size=1,
        hidden=(64, 32),
        pool_after=(1, 2, 3, 4),
        batch_norm=batch_norm,
        dtype=dtype,
        param_dtype=dtype,
    )
    if sharded:
        model = with_sharded_head(model, mesh)
    state = make_state(model, dtype, batch_norm)
    shardings = state_shardings(state, mesh, sharded)
    state = jax.device_put(state, shardings)
    step = jax.jit(train_step, out_shardings=(shardings, NamedSharding(mesh, P())))
    random = np.random.default_rng(0)
    for _ in range(5):
        batch = {
            "image": random.normal(size=(16, *IMAGE_SHAPE)).astype(dtype),
            "label": random.integers(0, 16, 16).astype(np.int32),
        }
        state, _ = step(state, jax.device_put(batch, NamedSharding(mesh, P(AXIS))), jax.random.key(1))
    return state


EVERY_RUN = [(2, True, True, "float64")]
CELLS = [
    pytest.param(*cell, marks=() if cell in EVERY_RUN else pytest.mark.slow, id="-".join(map(str, cell)))
    for cell in (
        (devices, sharded, batch_norm, dtype)
        for batch_norm in (False, True)
        for dtype in TOLERANCE
        for devices in (1, 2, 4, 8)
        for sharded in (False, True)
        if devices > 1 or sharded
    )
]


@pytest.mark.parametrize(("devices", "sharded", "batch_norm", "dtype"), CELLS)
def test_sharded_steps_equal_those_of_one_device(devices, sharded, batch_norm, dtype, x64, narrow):
    state, one = (train(*cell, batch_norm, dtype) for cell in ((devices, sharded), (1, False)))
    assert relative_error(state.params, one.params) < TOLERANCE[dtype]
    assert relative_error(state.opt_state, one.opt_state) < 10 * TOLERANCE[dtype]  # differences have fewer digits
    if batch_norm:
        assert relative_error(state.batch_stats, one.batch_stats) < TOLERANCE[dtype]


def test_each_device_holds_a_shard_of_head_and_momentum():
    mesh = mesh_of(8)
    model = VGG(11, num_classes=16, pool_size=1, hidden=(64, 32), pool_after=(1, 2, 3, 4))
    state = jax.eval_shape(lambda: make_state(model, "float32", False))
    for sharded in (False, True):
        shardings = jax.tree_util.tree_leaves_with_path(state_shardings(state, mesh, sharded))
        leaves = jax.tree_util.tree_leaves_with_path(state)
        assert len(shardings) == len(leaves)
        divided = 0
        for (path, sharding), (_, leaf) in zip(shardings, leaves, strict=True):
            name = jax.tree_util.keystr(path)
            is_head = "'fc" in name and "kernel" in name
            parts = leaf.size // np.prod(sharding.shard_shape(leaf.shape), dtype=int)
            assert parts == (8 if sharded and is_head else 1), name
            divided += is_head
        assert divided == 6  # three kernels and their momentum


def test_head_sharding_is_not_saved(tmp_path):
    model = with_sharded_head(VGG(11, num_classes=16, pool_size=1, hidden=()), mesh_of(8))
    path = tmp_path / "net.safetensors"
    save_file(path, Loaded(model, random_variables(model, 32, 32, 3)))
    assert load(path).model.head_sharding is None


@pytest.mark.slow
def test_sharded_head_sends_a_sixth_of_the_bytes():
    """The compiled programs of VGG-16 at 224 on 8 devices, global batch 256, agree with the formula."""
    moved, held = {}, {}
    for sharded in (False, True):
        compiled = compile_step(depth=16, batch_size=256, devices=8, sharded=sharded)
        moved[sharded] = ring_bytes(compiled.as_text(), 8)
        held[sharded] = held_bytes(compiled)
        assert moved[sharded] == pytest.approx(predicted_bytes(16, 256, 8, sharded), rel=0.03)
    assert moved[True] < moved[False] / 6
    head = 2 * 4 * (25088 * 4096 + 4096 * 4096 + 4096 * 1000)  # the kernels and their momentum
    assert held[False] - held[True] == pytest.approx(head * 7 / 8, rel=1e-3)


def test_ring_bytes_of_each_collective():
    program = """
  %a = f32[8,4]{1,0} all-reduce(%x), channel_id=1
  ROOT %b = (f32[2]{0}, bf16[4]{0}) all-reduce(%x, %y), channel_id=2
  %c = f32[16]{0} all-gather(%x), dimensions={0}
  %d = (f32[1,2]{1,0}, f32[1,2]{1,0}) all-to-all(%x, %y), channel_id=3
  %e = f32[2]{0} reduce-scatter(%x), channel_id=4
  %f = f32[100]{0} add(%a, %b)
"""
    # Each of 4 devices sends 2 * 3/4 of reduced bytes, 3/4 of gathered or exchanged bytes, 3 times its scattered bytes.
    expected = 1.5 * 128 + 1.5 * (8 + 8) + 0.75 * 64 + 0.75 * 16 + 3 * 8
    assert ring_bytes(program, 4) == expected
