"""The product of the dense layers against XLA's."""

import jax
import numpy as np
import pytest

from tests.conftest import relative_error
from tests.ops.reference import ROUNDING, normal
from vgg_jax.ops.dense import dense_product


@pytest.mark.parametrize("channels", [1024, 512, 300])  # in two parts, in one part, not divisible into parts
def test_dense_product_equals_xla(channels, x64):
    x, kernel, dy = normal(3, channels), normal(channels, 5, seed=1), normal(3, 5, seed=2)
    y, vjp = jax.vjp(jax.jit(dense_product), x, kernel)
    np.testing.assert_allclose(y, x @ kernel, rtol=ROUNDING)
    for actual, expected in zip(vjp(dy), (dy @ kernel.T, x.T @ dy), strict=True):
        assert relative_error(actual, expected) < ROUNDING
