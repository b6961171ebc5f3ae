"""Inputs for the tests of the operations, and PyTorch's results for them."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tests.conftest import relative_error

ROUNDING = 1e-12  # both sides are float64 sums, in different orders


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def to_torch(x):
    """Return an NHWC array as an NCHW tensor that records gradients."""
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).requires_grad_()


def from_torch(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def output_and_gradient(layer, x, weights):
    """Return the output of a layer, and the gradient of its weighted sum with respect to the input."""

    def loss(x):
        y = layer(x)
        return (y * weights).sum(), y

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(x))
    return y, gradient


def torch_output_and_gradient(layer, x, weights):
    """Return the same of a PyTorch layer."""
    tensor = to_torch(x)
    y = layer(tensor)
    (y * torch.from_numpy(weights.transpose(0, 3, 1, 2))).sum().backward()
    return from_torch(y), from_torch(tensor.grad)


def check_layer(layer, torch_layer, x, weights):
    """Compare the output and the gradient of a layer with those of a PyTorch layer, up to rounding."""
    actual = output_and_gradient(layer, x, weights)
    expected = torch_output_and_gradient(torch_layer, x, weights)
    for ours, theirs in zip(actual, expected, strict=True):
        assert relative_error(ours, theirs) < ROUNDING
