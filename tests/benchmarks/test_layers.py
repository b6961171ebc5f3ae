"""The profile of the layers beside an engine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import layers
from benchmarks.throughput_cells import parse_cell, write_inputs
from vgg_jax import VGG
from vgg_jax.ops.inference_layers import kernel_shape


@pytest.mark.parametrize(
    ("method", "side", "rows"),
    [("winograd4", 8, 4), ("winograd2", 7, 16), ("im2col", 4, 16), ("direct", 32, 1024), ("karatsuba", 2, 1)],
)
def test_rows_follow_the_form_of_the_kernel(method, side, rows):
    assert layers.rows_of(jnp.zeros(kernel_shape((3, 3, 8, 16), method)), side) == rows


def test_times_of_a_layer_are_added_up():
    one, two = [1.0] * layers.CALLS, [2.0, 4.0] * layers.CALLS  # twice in a call
    found = layers.by_layer({"VGG/conv1_1/dot 1": one, "VGG/conv1_1/add 2": two, "transpose": one})
    assert found == {"conv1_1": 7.0, layers.OTHER: 1.0}


def test_trace_has_every_layer(narrow, tmp_path):
    cell = parse_cell("vgg11_bn-32-infer", 1)
    write_inputs(cell, str(tmp_path))
    with np.load(tmp_path / "weights.npz") as weights, np.load(tmp_path / "inputs.npz") as inputs:
        ours = layers.Ours(cell, dict(weights), inputs["images"])
    names = {layer.name for part in VGG(**cell.fields).stages for layer in part if layer.kind == "conv"} | {"fc8"}
    assert names <= ours.times().keys()
    floors = ours.floors(1e9, 1e9, dict.fromkeys(names - {"fc8"}, 1))
    assert floors.keys() == names
    kernel = jax.tree.leaves(ours.variables["params"]["fc8"]["kernel"])[0]
    assert floors["fc8"] == pytest.approx((kernel.nbytes / 2**20, 2e-9 * kernel.size, kernel.nbytes / 1e6))
