"""The examples, run small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import autoencoder, segmentation
from tests.conftest import random_variables
from vgg_jax import VGG
from vgg_jax.model import PLAIN


def test_segmentation_learns_the_digits(narrow):
    backbone = VGG(11, num_classes=None, hidden=(), final_layer="relu3_2", layers=PLAIN)
    before, after = segmentation.train(backbone, random_variables(backbone, 32, 32, 3), 40, side=32, test_images=8)
    assert before < 0.6
    assert after > before + 0.05


def test_mean_iou_by_hand():
    """Background: 2 of 3 pixels; digit: 1 of 2."""
    assert segmentation.mean_iou(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_autoencoder_loss_falls(monkeypatch):
    """LPIPS is replaced by a squared difference, because its trunk of full width compiles for long."""
    from sklearn.datasets import load_sample_images

    def distance(trunk, variables, output, images, input_range):
        assert input_range == (0, 1)
        return jnp.square(output - images).mean((1, 2, 3))

    monkeypatch.setattr(autoencoder, "lpips", distance)
    losses = autoencoder.train(None, {}, load_sample_images().images, 40, crop=16)
    assert np.isfinite(losses).all()
    assert losses[-10:].mean() < 0.9 * losses[:10].mean()


@pytest.mark.slow
def test_autoencoder_trains_for_200_steps():
    from sklearn.datasets import load_sample_images

    trunk = VGG(16, num_classes=None, hidden=())
    variables = jax.jit(trunk.init)(jax.random.key(1), jnp.zeros((1, 32, 32, 3)))
    losses = autoencoder.train(trunk, variables, load_sample_images().images, 200)
    assert np.isfinite(losses).all()
    assert losses[-20:].mean() < 0.8 * losses[:20].mean()
