"""Named activations, Gram matrices and the perceptual distance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import random_variables, relative_error
from vgg_jax import VGG
from vgg_jax.features import gram_matrix, layer_activations, perceptual_distance

MODEL = VGG(11, num_classes=5, hidden=(16, 8), pool_size=1)


@pytest.fixture(scope="module")
def variables():
    return random_variables(MODEL, 32, 32, 3)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (2, 32, 32, 3))


def test_every_layer_has_its_output(variables, images):
    outputs = jax.jit(functools.partial(layer_activations, MODEL, layers=MODEL.layer_names))(variables, images)
    assert list(MODEL.layer_names)[-7:] == ["fc6", "relu6", "drop6", "fc7", "relu7", "drop7", "fc8"]
    assert outputs["conv1_1"].shape == outputs["relu1_1"].shape == (2, 32, 32, 64)
    assert outputs["pool5"].shape == (2, 1, 1, 512)
    np.testing.assert_array_equal(outputs["relu3_2"], np.maximum(outputs["conv3_2"], 0))
    assert (np.asarray(outputs["conv3_2"]) < 0).any()
    np.testing.assert_array_equal(outputs["drop7"], outputs["relu7"])  # no dropout outside training
    np.testing.assert_array_equal(outputs["fc8"], jax.jit(MODEL.apply)(variables, images))


def test_deeper_layers_are_not_computed(variables, images):
    """The variables of deeper layers may be missing, and the compiled work is that of the requested layers."""
    shallow = {"params": {name: variables["params"][name] for name in ("conv1_1", "conv2_1")}}
    outputs = layer_activations(MODEL, shallow, images, ("relu2_1", "relu1_1"))
    assert list(outputs) == ["relu2_1", "relu1_1"]

    def flops(layer):
        run = jax.jit(lambda variables: layer_activations(MODEL, variables, images, (layer,)))
        return run.lower(variables).compile().cost_analysis()["flops"]

    # conv1_1 is 3 -> 64 channels at 32x32; conv2_1, 64 -> 128 at 16x16, has 10.7 times its products.
    assert 9 * flops("relu1_1") < flops("relu2_1") < 14 * flops("relu1_1")


def test_average_pool_replaces_max_pool(variables, images):
    outputs = jax.jit(functools.partial(layer_activations, MODEL, layers=("relu1_1", "pool1"), average_pool=True))(
        variables, images
    )
    expected = outputs["relu1_1"].reshape(2, 16, 2, 16, 2, 64).mean((2, 4))
    np.testing.assert_allclose(outputs["pool1"], expected, rtol=1e-5, atol=1e-7)  # a sum of four


@pytest.mark.parametrize("layers", [("relu1_1", "relu9_9"), (), ("Relu1_1",)])
def test_unknown_layers_list_the_known_ones(layers, variables, images):
    with pytest.raises(ValueError, match="expected some of conv1_1, relu1_1, pool1, conv2_1"):
        layer_activations(MODEL, variables, images, layers)


def test_gram_matrix_by_hand():
    maps = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    flat = maps.reshape(2, 12, 5).astype(np.float64)
    expected = np.stack([f.T @ f for f in flat]) / 60
    assert relative_error(gram_matrix(jnp.asarray(maps)), expected) < 1e-6  # float32 sums of 12


def test_perceptual_distance_and_its_gradient(variables, images):
    others = images + 0.1 * jax.random.normal(jax.random.key(2), images.shape)
    weights = {"relu1_1": 2.0, "fc6": 0.5}
    maps = jax.jit(functools.partial(layer_activations, MODEL, variables, layers=list(weights)))
    ours, theirs = maps(images), maps(others)
    expected = sum(w * np.square(ours[k] - theirs[k]).reshape(2, -1).mean(1) for k, w in weights.items())
    distance = jax.jit(lambda x: perceptual_distance(MODEL, variables, x, others, weights))
    np.testing.assert_allclose(distance(images), expected, rtol=1e-5)
    assert (distance(others) < 1e-12).all()  # float32 rounding, squared: the two passes are compiled apart
    step = jax.jit(jax.grad(lambda x: distance(x).sum()))(images)
    assert (distance(images - step / jnp.linalg.norm(step)) < distance(images)).all()
