"""Every layer of ours against PyTorch's or XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax import lax

from tests.conftest import relative_error
from vgg_jax import convolution
from vgg_jax.convolution import conv3x3
from vgg_jax.layers import BatchNorm, adaptive_avg_pool, dense_product, local_response_norm, max_pool

# Both sides are float64 sums in another order.
ROUNDING = 1e-12


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def to_torch(x):
    """NHWC to an NCHW tensor that records gradients."""
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).requires_grad_()


def from_torch(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def output_and_gradient(layer, x, weights):
    """The layer's output, and the gradient of its weighted sum by the input."""

    def loss(x):
        y = layer(x)
        return (y * weights).sum(), y

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(x)
    return y, gradient


def conv_by_xla(x, kernel, bias):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers) + bias


def check_conv3x3(n, height, width, channels, features, seed=0):
    """Value and all gradients beside those of XLA's convolution."""
    x, kernel, bias, dy = (
        normal(*shape, seed=seed + i)
        for i, shape in enumerate(
            [(n, height, width, channels), (3, 3, channels, features), (features,), (n, height, width, features)]
        )
    )
    results = []
    for conv in (conv3x3, conv_by_xla):

        @jax.jit
        def value_and_gradients(x, kernel, bias, dy, conv=conv):
            y, vjp = jax.vjp(conv, x, kernel, bias)
            return y, vjp(dy)

        results.append(value_and_gradients(x, kernel, bias, dy))
    for actual, expected in zip(*(jax.tree.leaves(result) for result in results), strict=True):
        assert relative_error(actual, expected) < ROUNDING


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 2), (5, 4)], ids=str)
def test_conv3x3_equals_xla(size, channels, x64):
    check_conv3x3(2, *size, channels, 7)


@settings(max_examples=16, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(
    # Of more than 2 rows and 4 channels, and so by Winograd's algorithm.
    size=st.tuples(*(st.integers(*limits) for limits in ((1, 3), (3, 11), (1, 11), (5, 9), (1, 7)))),
    seed=st.integers(0, 2**16),
    smallest_band=st.sampled_from([0, 2**30]),  # in bands, or all at once
)
def test_conv3x3_equals_xla_for_every_shape(size, seed, smallest_band):
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "SMALLEST_WORK", 0)
        patch.setattr(convolution, "SMALLEST_BAND", smallest_band)
        patch.setattr(jax, "device_count", lambda: 1)
        check_conv3x3(*size, seed=seed)


@pytest.mark.parametrize("channels", [1024, 512, 300])  # in two parts, in one, and not in parts
def test_dense_product_equals_xla(channels, x64):
    x, kernel, dy = normal(3, channels), normal(channels, 5, seed=1), normal(3, 5, seed=2)
    y, vjp = jax.vjp(jax.jit(dense_product), x, kernel)
    np.testing.assert_allclose(y, x @ kernel, rtol=ROUNDING)
    for actual, expected in zip(vjp(dy), (dy @ kernel.T, x.T @ dy), strict=True):
        assert relative_error(actual, expected) < ROUNDING


@pytest.mark.parametrize("size", [(2, 2), (4, 6), (5, 4), (7, 7)], ids=str)
def test_max_pool_equals_torch_ties_included(size, x64):
    # Three distinct values make ties in most windows.
    x = np.random.default_rng(0).integers(-1, 2, (3, *size, 8)).astype(np.float64)
    weights = normal(3, size[0] // 2, size[1] // 2, 8, seed=1)
    tensor = to_torch(x)
    pooled = torch.nn.functional.max_pool2d(tensor, 2)
    (pooled * torch.from_numpy(weights.transpose(0, 3, 1, 2))).sum().backward()
    y, gradient = output_and_gradient(max_pool, x, weights)
    np.testing.assert_array_equal(y, from_torch(pooled))
    np.testing.assert_array_equal(gradient, from_torch(tensor.grad))


@pytest.mark.parametrize("position", range(4))
def test_max_pool_keeps_nan(position):
    x = np.arange(4.0).reshape(1, 2, 2, 1)
    x.reshape(-1)[position] = np.nan
    assert np.isnan(max_pool(jnp.asarray(x)))


def check_adaptive_avg_pool(height, width, size):
    """Value and gradient beside PyTorch's."""
    x, weights = normal(2, height, width, 3), normal(2, size, size, 3, seed=1)
    tensor = to_torch(x)
    pooled = torch.nn.functional.adaptive_avg_pool2d(tensor, size)
    (pooled * torch.from_numpy(weights.transpose(0, 3, 1, 2))).sum().backward()
    y, gradient = output_and_gradient(lambda x: adaptive_avg_pool(x, size), x, weights)
    assert relative_error(y, from_torch(pooled)) < ROUNDING
    assert relative_error(gradient, from_torch(tensor.grad)) < ROUNDING


SIDES = (1, 2, 3, 5, 6, 7, 8, 10, 13, 14, 15, 31)


@pytest.mark.parametrize("height", SIDES)
def test_adaptive_avg_pool_equals_torch(height, x64):
    for step in (0, 1, 5):  # another width for each height
        check_adaptive_avg_pool(height, SIDES[(SIDES.index(height) + step) % len(SIDES)], 7)


@pytest.mark.grid
@pytest.mark.parametrize("height", SIDES)
def test_adaptive_avg_pool_equals_torch_at_every_width(height, x64):
    for width in SIDES:
        check_adaptive_avg_pool(height, width, 7)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), size=st.integers(1, 12))
def test_adaptive_avg_pool_equals_torch_at_any_size(height, width, size):
    with jax.enable_x64(True):
        check_adaptive_avg_pool(height, width, size)


def test_local_response_norm_equals_torch(x64):
    x, weights = 10 * normal(2, 3, 4, 16), normal(2, 3, 4, 16, seed=1)
    tensor = to_torch(x)
    normalised = torch.nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2)(tensor)
    (normalised * torch.from_numpy(weights.transpose(0, 3, 1, 2))).sum().backward()
    y, gradient = output_and_gradient(local_response_norm, x, weights)
    assert relative_error(y, from_torch(normalised)) < ROUNDING
    assert relative_error(gradient, from_torch(tensor.grad)) < ROUNDING


def test_batch_norm_trains_as_torch(x64):
    """Output, gradients and running statistics over three batches, then the output by the running statistics."""
    layer, reference = BatchNorm(dtype=jnp.float64, param_dtype=jnp.float64), torch.nn.BatchNorm2d(6).double()
    variables = layer.init(jax.random.key(0), normal(2, 3, 4, 6), False)
    scale, bias = normal(6, seed=8), normal(6, seed=9)
    params, batch_stats = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}, variables["batch_stats"]
    with torch.no_grad():
        reference.weight.copy_(torch.from_numpy(scale))
        reference.bias.copy_(torch.from_numpy(bias))

    def loss(params, batch_stats, x, weights):
        y, updates = layer.apply({"params": params, "batch_stats": batch_stats}, x, False, mutable=["batch_stats"])
        return (y * weights).sum(), (y, updates["batch_stats"])

    for seed in range(3):
        x, weights = 5 + 3 * normal(2, 3, 4, 6, seed=seed), normal(2, 3, 4, 6, seed=seed + 3)
        (gradients, input_gradient), (y, batch_stats) = jax.grad(loss, argnums=(0, 2), has_aux=True)(
            params, batch_stats, x, weights
        )
        tensor = to_torch(x)
        reference.zero_grad()
        expected = reference(tensor)
        (expected * torch.from_numpy(weights.transpose(0, 3, 1, 2))).sum().backward()
        assert relative_error(y, from_torch(expected)) < ROUNDING
        assert relative_error(input_gradient, from_torch(tensor.grad)) < ROUNDING
        assert relative_error(gradients["scale"], reference.weight.grad.numpy()) < ROUNDING
        assert relative_error(gradients["bias"], reference.bias.grad.numpy()) < ROUNDING
    assert relative_error(batch_stats["mean"], reference.running_mean.numpy()) < ROUNDING
    assert relative_error(batch_stats["var"], reference.running_var.numpy()) < ROUNDING

    y = layer.apply({"params": params, "batch_stats": batch_stats}, x, True)
    assert relative_error(y, from_torch(reference.eval()(to_torch(x)))) < ROUNDING


def test_batch_norm_in_bfloat16_keeps_float32_statistics():
    layer = BatchNorm(dtype=jnp.bfloat16)
    x = jnp.asarray(100 + normal(8, 4, 4, 2), jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x, False)
    y, updates = layer.apply(variables, x, False, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
    # The mean of the bfloat16 inputs, exact in float32 but for rounding: bfloat16 sums would be off by whole units.
    expected = 0.1 * np.asarray(x, np.float64).mean((0, 1, 2))
    np.testing.assert_allclose(updates["batch_stats"]["mean"], expected, rtol=1e-6)
