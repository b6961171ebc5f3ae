"""The first convolution starts from the principal axes of the patches of training images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tests.conftest import raises_user_error
from vgg_jax.config import Config, DataConfig, ModelConfig
from vgg_jax.data.sampler import train_indices
from vgg_jax.training import loop
from vgg_jax.training.sharding import AXIS
from vgg_jax.training.state import with_axes
from vgg_jax.training.validation import check_config
from vgg_jax.training.whitening import patch_axes

MEAN, STD = 0.3, 0.4


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()[:1]), (AXIS,))


@pytest.fixture
def config(data_dir):
    """An epoch of zeros and ones in nine steps."""
    data = DataConfig(dataset="digits", data_dir=data_dir, classes=(0, 1), mean=(MEAN,), std=(STD,))
    return Config(
        model=ModelConfig(depth=11, pool_after=(1, 2, 3, 4)),
        data=dataclasses.replace(data, image_size=16, resize=16),
        batch_size=32,
        whitening=True,
    )


@pytest.fixture
def run(config, mesh, narrow):
    return loop.build(config, mesh)


def test_patch_axes_equal_numpys(run):
    """The 288 zeros and ones of an epoch are fewer than the images that a larger split would give."""
    indices = np.concatenate([train_indices(run.config.seed, step, 32, len(run.train_split)) for step in range(9)])
    images = np.stack([run.train_split.test_view(int(i))[0] for i in indices])
    windows = np.lib.stride_tricks.sliding_window_view((images / 255.0 - MEAN) / STD, (3, 3), axis=(1, 2))
    patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 9)
    variances, expected = np.linalg.eigh(patches.T @ patches / len(patches))
    axes = patch_axes(run)
    signs = np.sign((axes * expected[:, ::-1]).sum(0))
    np.testing.assert_allclose(axes * signs, expected[:, ::-1], atol=1e-4)  # of float32 sums over 56,448 patches
    assert (np.diff(variances) > 0.001 * variances[:-1]).all()  # otherwise the axes would be arbitrary


def test_kernel_has_pairs_of_axes_and_random_channels():
    random = np.random.default_rng(0)
    axes = np.linalg.qr(random.normal(size=(27, 27)))[0].astype(np.float32)
    kernel = jnp.asarray(random.normal(size=(3, 3, 3, 64)), jnp.float32)
    columns = np.asarray(with_axes(kernel, axes)).reshape(27, 64)
    norm = np.sqrt(2 * 27 / (9 * 64))  # of He's initialization by the fan-out
    np.testing.assert_allclose(columns[:, 0:54:2], norm * axes, atol=1e-6)
    np.testing.assert_allclose(columns[:, 1:54:2], -norm * axes, atol=1e-6)
    np.testing.assert_array_equal(columns[:, 54:], kernel.reshape(27, 64)[:, 54:])


def test_narrow_kernel_takes_the_axes_of_largest_variance():
    axes = np.eye(9, dtype=np.float32)
    columns = np.asarray(with_axes(jnp.ones((3, 3, 1, 8)), axes)).reshape(9, 8)
    np.testing.assert_allclose(columns[:, ::2], np.sqrt(2 / 8) * axes[:, :4], atol=1e-6)


def test_whitening_without_batch_norm_is_refused(config):
    config.model.batch_norm = False
    with raises_user_error("config.whitening is True; expected False, because config.model.batch_norm is False"):
        check_config(config)


@pytest.mark.parametrize("layers", [("features",), ("conv1_1", "head")])
def test_whitening_of_a_given_layer_is_refused(layers, config):
    config.init_from, config.init_layers = "runs/other", layers
    with raises_user_error("config.whitening is True; expected False, because conv1_1 comes from config.init_from"):
        check_config(config)
    config.init_layers = ("conv2_1",)
    check_config(config)
