"""The ReLU of the networks."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch.nn.functional import relu as torch_relu

from tests.ops.reference import output_and_gradient, torch_output_and_gradient
from vgg_jax.ops.layers import FAST, PLAIN, relu


@pytest.mark.parametrize("after_norm", [True, False])
def test_relu_and_its_gradient_equal_torch(after_norm, x64):
    x = np.array([-np.inf, -2.0, -0.0, 0.0, 1e-300, 3.0, np.inf]).reshape(1, 1, 7, 1)
    weights = np.arange(1.0, 8.0).reshape(x.shape)
    expected = torch_output_and_gradient(torch_relu, x, weights)
    ours = output_and_gradient(lambda x: relu(x, after_norm), x, weights)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("after_norm", [True, False])
def test_relu_has_forward_and_second_derivatives(after_norm, x64):
    x = jnp.array([-1.0, 0.0, 2.0])
    cube = jax.hessian(lambda x: (relu(x, after_norm) ** 3).sum())
    np.testing.assert_array_equal(jnp.diag(cube(x)), [0, 0, 12])


def test_relu_after_a_convolution_keeps_only_its_output():
    saved = jax.make_jaxpr(lambda x: jax.vjp(lambda x: relu(x, False), x)[1])(jnp.ones(3))
    compared = [eqn for eqn in saved.eqns if eqn.primitive.name in ("gt", "ne")]
    assert [eqn.primitive.name for eqn in compared] == ["ne"]  # XLA asks "gt" of the input, which it then keeps
    assert compared[0].invars[0] not in saved.jaxpr.invars


@pytest.mark.parametrize("layers", [FAST, PLAIN])
def test_layers_are_pickled(layers):
    assert pickle.loads(pickle.dumps(layers)) == layers
