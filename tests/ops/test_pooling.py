"""The pools against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import adaptive_avg_pool2d, max_pool2d

from tests.ops.reference import check_layer, normal, output_and_gradient, torch_output_and_gradient
from vgg_jax.ops.pooling import adaptive_pool, max_pool


@pytest.mark.parametrize("size", [(2, 2), (4, 6), (5, 4), (7, 7)], ids=str)
def test_max_pool_equals_torch_with_ties(size, x64):
    x = np.random.default_rng(0).integers(-1, 2, (3, *size, 8)).astype(np.float64)  # three values: many ties
    weights = normal(3, size[0] // 2, size[1] // 2, 8, seed=1)
    expected = torch_output_and_gradient(lambda x: max_pool2d(x, 2), x, weights)
    for ours, theirs in zip(output_and_gradient(max_pool, x, weights), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_max_pool_forward_mode_agrees_with_torch_at_ties(x64):
    """Forward mode is the transpose of PyTorch's gradient: both follow the first maximum."""
    x = np.random.default_rng(0).integers(-1, 2, (3, 5, 4, 8)).astype(np.float64)
    direction, weights = normal(3, 5, 4, 8, seed=1), normal(3, 2, 2, 8, seed=2)
    _, tangent = jax.jvp(max_pool, (jnp.asarray(x),), (jnp.asarray(direction),))
    _, gradient = torch_output_and_gradient(lambda x: max_pool2d(x, 2), x, weights)
    np.testing.assert_allclose((tangent * weights).sum(), (direction * gradient).sum(), rtol=1e-12)


@pytest.mark.parametrize("position", range(4))
def test_max_pool_keeps_nan(position):
    x = np.arange(4.0).reshape(1, 2, 2, 1)
    x.reshape(-1)[position] = np.nan
    assert np.isnan(max_pool(jnp.asarray(x)))


def check_adaptive_avg_pool(height, width, size):
    x, weights = normal(2, height, width, 3), normal(2, size, size, 3, seed=1)
    check_layer(lambda x: adaptive_pool(x, size, size), lambda x: adaptive_avg_pool2d(x, size), x, weights)


SIDES = (1, 2, 3, 5, 6, 7, 8, 10, 13, 14, 15, 31)


@pytest.mark.parametrize("height", SIDES)
def test_adaptive_avg_pool_equals_torch(height, x64):
    for step in (0, 1, 5):  # three widths per height, different for each height
        check_adaptive_avg_pool(height, SIDES[(SIDES.index(height) + step) % len(SIDES)], 7)


@pytest.mark.slow
@pytest.mark.parametrize("height", SIDES)
def test_adaptive_avg_pool_equals_torch_at_every_width(height, x64):
    for width in SIDES:
        check_adaptive_avg_pool(height, width, 7)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), size=st.integers(1, 12))
def test_adaptive_avg_pool_equals_torch_at_any_size(height, width, size):
    with jax.enable_x64(True):
        check_adaptive_avg_pool(height, width, size)
