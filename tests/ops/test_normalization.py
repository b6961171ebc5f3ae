"""The normalization layers against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.conftest import relative_error
from tests.ops.reference import ROUNDING, check_layer, from_torch, normal, to_torch
from vgg_jax.ops.normalization import BatchNorm, local_response_norm


def test_local_response_norm_equals_torch(x64):
    layer = torch.nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2)
    check_layer(local_response_norm, layer, 10 * normal(2, 3, 4, 16), normal(2, 3, 4, 16, seed=1))


def test_batch_norm_trains_as_torch(x64):
    """Compare outputs, gradients and running statistics over three batches, then the output by these statistics."""
    layer, reference = BatchNorm(dtype=jnp.float64, param_dtype=jnp.float64), torch.nn.BatchNorm2d(6).double()
    variables = layer.init(jax.random.key(0), jnp.asarray(normal(2, 3, 4, 6)), False)
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

    y = layer.apply({"params": params, "batch_stats": batch_stats}, jnp.asarray(x), True)
    assert relative_error(y, from_torch(reference.eval()(to_torch(x)))) < ROUNDING


def test_batch_norm_in_bfloat16_keeps_float32_statistics():
    layer = BatchNorm(dtype=jnp.bfloat16)
    x = jnp.asarray(100 + normal(8, 4, 4, 2), jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x, False)
    y, updates = layer.apply(variables, x, False, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
    # The mean of the bfloat16 inputs, up to float32 rounding. Sums in bfloat16 would be wrong by whole units.
    expected = 0.1 * np.asarray(x, np.float64).mean((0, 1, 2))
    np.testing.assert_allclose(updates["batch_stats"]["mean"], expected, rtol=1e-6)


def test_batch_norm_of_one_value_is_refused_as_in_torch():
    layer = BatchNorm()
    x = jnp.ones((1, 1, 1, 3))
    variables = layer.init(jax.random.key(0), x, False)  # initialization needs no statistics
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer.apply(variables, x, False, mutable=["batch_stats"])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        torch.nn.BatchNorm2d(3)(torch.ones(1, 3, 1, 1))
    np.testing.assert_allclose(layer.apply(variables, x, True), x, rtol=1e-4)
    layer.apply(variables, jnp.ones((2, 1, 1, 3)), False, mutable=["batch_stats"])
