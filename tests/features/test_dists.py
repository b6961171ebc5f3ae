"""DISTS against the package `dists-pytorch`, with the same random trunk and the authors' weights."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.features.test_lpips import images, network, torch_tensor, trunk  # noqa: F401 - fixtures
from vgg_jax.errors import UserError
from vgg_jax.features import dists
from vgg_jax.features.dists import _weights, l2_pool
from vgg_jax.model import VGG


@pytest.fixture(scope="module")
def reference(trunk):  # noqa: F811 - the fixture
    """Return the package's metric with the trunk replaced and its published weights."""
    import DISTS_pytorch
    import torch

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr("torchvision.models.vgg16", lambda pretrained: type("Net", (), {"features": trunk}))
        metric = DISTS_pytorch.DISTS(load_weights=False).double()
    alpha, beta = (np.concatenate([pair[i] for pair in _weights()]) for i in (0, 1))
    metric.alpha.data, metric.beta.data = (torch.from_numpy(x).view(1, -1, 1, 1) for x in (alpha, beta))
    return metric


@pytest.mark.parametrize("size", [(33, 47), pytest.param((65, 97), marks=pytest.mark.slow)])
def test_distances_equal_those_of_dists_pytorch(network, reference, size):  # noqa: F811 - the fixture
    """Equal to 1e-10 in float64, gradients too: the same sums in another order."""
    model, variables = network
    first, second = images(size, 0.0, 1.0)
    tensor = torch_tensor(first).requires_grad_()
    expected = reference(tensor, torch_tensor(second), require_grad=True)
    expected.sum().backward()
    with jax.enable_x64(True):
        found, gradient = jax.value_and_grad(lambda x: dists(model, variables, x, second, input_range=(0, 1)).sum())(
            jnp.asarray(first)
        )
    np.testing.assert_allclose(found, expected.item(), rtol=1e-10)
    theirs = np.moveaxis(tensor.grad.numpy(), 1, -1)
    np.testing.assert_allclose(gradient, theirs, rtol=0, atol=1e-8 * np.abs(theirs).max())


@pytest.mark.slow
def test_gradients_are_finite_for_equal_and_black_images(network):  # noqa: F811 - the fixture
    model, variables = network
    model = model.clone(dtype=jnp.float32, param_dtype=jnp.float32)
    variables = jax.tree.map(np.float32, variables)
    first, second = (np.float32(x) for x in images((32, 32), 0, 255))
    distance = functools.partial(dists, model, variables, input_range=(0, 255))
    for pair in ((first, first), (np.zeros_like(first), second)):
        value, gradient = jax.value_and_grad(lambda x, y: distance(x, y).sum())(*pair)
        assert np.isfinite(value) and np.isfinite(gradient).all()
    np.testing.assert_allclose(distance(first, first), 0, atol=1e-6)
    with pytest.raises(UserError, match="the others have shape"):
        distance(first, second[:, :20])
    with pytest.raises(UserError, match="DISTS is defined on VGG-16"):
        dists(VGG(19), variables, first, second, input_range=(0, 255))


def test_l2_pool_keeps_the_odd_last_row():
    """As the package's convolution of stride 2 with padding 1."""
    assert l2_pool(jnp.ones((1, 5, 8, 3))).shape == (1, 3, 4, 3)
    np.testing.assert_allclose(l2_pool(jnp.full((1, 6, 6, 1), 3.0))[0, 1, 1, 0], 3.0, rtol=1e-6)
