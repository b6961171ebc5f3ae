"""All forms of an operation give the same result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch.nn.functional import max_pool2d

from tests.ops.reference import normal, output_and_gradient, torch_output_and_gradient
from vgg_jax.data.augmentation import crop_forms
from vgg_jax.ops.bias import add_bias
from vgg_jax.ops.bilinear import FEW_CHANNELS
from vgg_jax.ops.pooling import MAX_POOLS
from vgg_jax.training.finite import FINITE


@pytest.mark.parametrize("form", MAX_POOLS)
def test_every_max_pool_follows_the_first_maximum(form, x64):
    x = np.random.default_rng(0).integers(-1, 2, (3, 5, 6, 8)).astype(np.float64)  # three values: many ties
    weights = normal(3, 2, 3, 8, seed=1)
    expected = torch_output_and_gradient(lambda x: max_pool2d(x, 2), x, weights)
    for ours, theirs in zip(output_and_gradient(MAX_POOLS[form], x, weights), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_every_random_crop_gives_the_same_pixels(dtype):
    random = np.random.default_rng(0)
    images, corners = random.integers(0, 256, (9, 7, 9, 3)).astype(dtype), random.integers(0, 5, (9, 2))
    expected = np.stack([image[y : y + 3, x : x + 5] for image, (y, x) in zip(images, corners, strict=True)])
    for name, form in crop_forms(2).items():
        np.testing.assert_array_equal(form(jnp.asarray(images), jnp.asarray(corners)), expected, err_msg=name)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", FINITE)
def test_every_finite_check_names_the_tensor(form, value):
    tensors = [np.ones(shape, np.float32) for shape in ((), (3,), (2, 4096), (5, 2), (4096,))]
    for bad, tensor in enumerate(tensors):
        changed = [t.copy() for t in tensors]
        changed[bad][(-1,) * tensor.ndim] = value
        assert FINITE[form](*map(jnp.asarray, changed)).tolist() == [i != bad for i in range(5)]


def test_bias_gradient_in_bfloat16_is_summed_in_float32():
    y, bias = jnp.zeros((1000, 3), jnp.bfloat16), jnp.zeros(3)
    gradient = jax.grad(lambda bias: add_bias(y, bias).astype(jnp.float32).sum())(bias)
    np.testing.assert_array_equal(gradient, np.full(3, 1000, np.float32))


@pytest.mark.parametrize("form", MAX_POOLS)
def test_every_max_pool_has_the_same_forward_derivative(form, x64):
    x = np.random.default_rng(0).integers(-1, 2, (3, 5, 6, 8)).astype(np.float64)
    direction, weights = normal(*x.shape, seed=2), normal(3, 2, 3, 8, seed=1)
    _, tangent = jax.jvp(MAX_POOLS[form], (jnp.asarray(x),), (jnp.asarray(direction),))
    _, gradient = torch_output_and_gradient(lambda x: max_pool2d(x, 2), x, weights)
    np.testing.assert_allclose((tangent * weights).sum(), (gradient * direction).sum(), rtol=1e-12)


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("form", MAX_POOLS)
def test_every_max_pool_keeps_nan(form, position):
    x = np.arange(4.0).reshape(1, 2, 2, 1)
    x[0, position // 2, position % 2] = np.nan
    assert np.isnan(MAX_POOLS[form](jnp.asarray(x))).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_convolutions_of_few_channels_agree(channels, x64):
    x, kernel, dy = normal(2, 5, 6, channels), normal(3, 3, channels, 7, seed=1), normal(2, 5, 6, 7, seed=2)

    def results(form):
        y, pull_back = jax.vjp(lambda x, kernel: FEW_CHANNELS[form](x, kernel, None), x, kernel)
        return (y, *pull_back(jnp.asarray(dy)))

    for ours, expected in zip(results("filled_up"), results("as_it_is"), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-13)  # rounding of sums of at most 63 terms
