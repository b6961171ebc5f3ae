"""The 3x3 convolution against XLA's."""

import jax
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax import lax

from tests.conftest import relative_error
from tests.ops.reference import ROUNDING, normal
from vgg_jax.ops import conv3x3 as convolution
from vgg_jax.ops import methods
from vgg_jax.ops.conv3x3 import conv3x3


def conv_by_xla(x, kernel, bias):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers) + bias


def check_conv3x3(n, height, width, channels, features, seed=0):
    """Compare the output and all gradients with those of XLA's convolution."""
    x, kernel, bias, dy = (
        normal(*shape, seed=seed + i)
        for i, shape in enumerate(
            [(n, height, width, channels), (3, 3, channels, features), (features,), (n, height, width, features)]
        )
    )
    results = []
    for conv in (conv3x3, conv_by_xla):

        @jax.jit
        def output_and_gradients(x, kernel, bias, dy, conv=conv):
            y, vjp = jax.vjp(conv, x, kernel, bias)
            return y, vjp(dy)

        results.append(output_and_gradients(x, kernel, bias, dy))
    for actual, expected in zip(*(jax.tree.leaves(result) for result in results), strict=True):
        assert relative_error(actual, expected) < ROUNDING


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 2), (5, 4)], ids=str)
def test_conv3x3_equals_xla(size, channels, x64):
    check_conv3x3(2, *size, channels, 7)


@settings(max_examples=16, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(
    # More than 2 rows and more than 4 channels select Winograd's algorithm.
    size=st.tuples(*(st.integers(*limits) for limits in ((1, 3), (3, 11), (1, 11), (5, 9), (1, 7)))),
    seed=st.integers(0, 2**16),
    smallest_band=st.sampled_from([0, 2**30]),  # in bands, or all at once
)
def test_winograd_equals_xla_for_every_shape(size, seed, smallest_band):
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "SMALLEST_WORK", 0)
        patch.setattr(methods, "SMALLEST_BAND", smallest_band)
        patch.setattr(jax, "device_count", lambda: 1)
        check_conv3x3(*size, seed=seed)
