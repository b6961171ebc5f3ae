"""Named activations, Gram matrices and the perceptual distance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import raises_user_error, random_variables, relative_error
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


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_gram_matrix_of_half_precision_sums_in_float32(dtype):
    """300 ** 2 * 64 positions is far above float16's largest number, 65,504."""
    maps = jnp.full((1, 8, 8, 2), 300, dtype)
    gram = gram_matrix(maps)
    assert gram.dtype == jnp.float32
    np.testing.assert_allclose(gram, np.full((1, 2, 2), 300**2 * 64 / (8 * 8 * 2)), rtol=1e-6)


def test_perceptual_distance_of_float16_sums_in_float32(variables):
    """conv1_1 with a kernel of one pixel that multiplies by 300: differences of 300, squares of 90,000."""
    model = MODEL.clone(dtype=jnp.float16)
    kernel = jnp.zeros((3, 3, 3, 64)).at[1, 1].set(100.0)
    shallow = {"params": {"conv1_1": {"kernel": kernel, "bias": jnp.zeros(64)}}}
    images, others = jnp.ones((1, 32, 32, 3), jnp.float16), jnp.zeros((1, 32, 32, 3), jnp.float16)
    distance = perceptual_distance(model, shallow, images, others, {"conv1_1": 1.0})
    np.testing.assert_allclose(distance, [300**2], rtol=1e-4)  # 65,536 squares in float32


def test_images_need_only_the_pools_of_the_deepest_layer(variables):
    """relu3_2 follows two max pools, so 4x4 images suffice; those of 18x18 are too small for the whole network."""
    assert [MODEL.smallest_image(layer) for layer in ("relu1_1", "pool1", "relu3_2", None)] == [1, 2, 4, 32]
    images = jax.random.normal(jax.random.key(1), (1, 18, 18, 3))
    outputs = layer_activations(MODEL, variables, images, ("relu1_1", "relu3_2"))
    assert outputs["relu3_2"].shape == (1, 4, 4, 256)
    with pytest.raises(ValueError, match="at least 4, which 2 max pools need"):
        layer_activations(MODEL, variables, images[:, :3], ("relu3_2",))
    with pytest.raises(ValueError, match="at least 32, which 5 max pools need"):
        layer_activations(MODEL, variables, images, ("fc6",))
    with pytest.raises(ValueError, match="found no layer relu9_9; expected one of conv1_1, relu1_1"):
        MODEL.smallest_image("relu9_9")


def test_one_layer_may_be_named_by_a_string(variables, images):
    outputs = layer_activations(MODEL, variables, images, "relu1_1")
    assert list(outputs) == ["relu1_1"]
    with raises_user_error("found no layer r; expected some of conv1_1"):
        layer_activations(MODEL, variables, images, "r")


@pytest.mark.parametrize("layers", [["relu1_1"], "relu1_1"], ids=["list", "string"])
def test_perceptual_distance_needs_weights(layers, variables, images, without_jaxtyping):
    with raises_user_error(f"layers is a {type(layers).__name__}; expected a dict from names to weights"):
        perceptual_distance(MODEL, variables, images, images, layers)


@pytest.mark.slow
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
