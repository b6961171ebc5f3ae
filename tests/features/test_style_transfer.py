"""Style transfer moves the Gram matrices of an image towards those of the style, and keeps the content."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.conftest import photographs, raises_user_error, random_variables, relative_error
from tests.narrow import NARROW_TABLE
from vgg_jax import VGG
from vgg_jax.data.preprocessing import AUTHORS, FEATURES, IMAGENET
from vgg_jax.features import gram_matrix, layer_activations, style_transfer
from vgg_jax.features.style_transfer import OPTIMIZERS, normalize
from vgg_jax.model import TABLE_1

MODEL = VGG(depth=11, num_classes=10, pool_size=1, hidden=())
# Zero padding is the mean in pixels. With equal means, the borders agree too.
PREPROCESSINGS = {
    "ImageNet's mean and std": IMAGENET,
    "authors, BGR": dataclasses.replace(AUTHORS, mean=IMAGENET.mean[::-1]),
    "features, std of 1/255": dataclasses.replace(FEATURES, mean=IMAGENET.mean),
}


@pytest.fixture
def narrow(monkeypatch):
    for column, stages in NARROW_TABLE.items():
        monkeypatch.setitem(TABLE_1, column, stages)


def pixels(count, side=48):
    return [IMAGENET.pixels(image, side)[None] / np.float32(255) for image in photographs(count)]


def folded(variables, preprocessing):
    """Return the variables of the network that computes, of images in another preprocessing, what it did of IMAGENET's.

    The channels of the first kernel are reordered and scaled.
    """
    kernel = np.asarray(variables["params"]["conv1_1"]["kernel"])
    kernel = kernel / np.array(IMAGENET.std, np.float32)[:, None]
    if preprocessing.channel_order == "BGR":
        kernel = kernel[:, :, ::-1]
    kernel = kernel * np.array(preprocessing.std, np.float32)[:, None]
    return {"params": variables["params"] | {"conv1_1": variables["params"]["conv1_1"] | {"kernel": kernel}}}


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_style_weight_balances_content_and_style(optimizer):
    variables = random_variables(MODEL, 32, 32, 3)
    content, style = pixels(2)

    layers = ["conv1_1", "conv2_1", "conv3_1", "conv4_2"]
    maps = jax.jit(functools.partial(layer_activations, MODEL, layers=layers, average_pool=True))

    def distances(image):
        """Return the distances from the content's activations and from the style's Gram matrices."""
        found, own, wanted = (maps(variables, normalize(x, IMAGENET)) for x in (image, content, style))
        found_grams, wanted_grams = ([gram_matrix(maps[name]) for name in layers[:3]] for maps in (found, wanted))
        return relative_error(found["conv4_2"], own["conv4_2"]), relative_error(found_grams, wanted_grams)

    paint = functools.partial(style_transfer, MODEL, variables, content, style, IMAGENET, optimizer=optimizer)
    steps = {"lbfgs": 10, "adam": 30}[optimizer]
    images = [paint(style_weight=weight, steps=steps, learning_rate=0.01) for weight in (0.0, 1.0, 1000.0)]
    np.testing.assert_array_equal(images[0], content)  # nothing to gain
    assert images[1].shape == content.shape
    assert all(image.min() >= 0 and image.max() <= 1 for image in images)
    (_, start), (near, some), (far, most) = map(distances, images)
    assert most < some < start
    assert most < 0.5 * start
    assert near < far


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_step_in_pixels_is_equal_in_all_preprocessings(optimizer):
    """The same network, with three preprocessings that are folded into its first layer, paints the same picture."""
    variables = random_variables(MODEL, 32, 32, 3)
    content, style = pixels(2)
    images = {
        name: style_transfer(
            MODEL, folded(variables, preprocessing), content, style, preprocessing, steps=1, optimizer=optimizer
        )
        for name, preprocessing in PREPROCESSINGS.items()
    }
    moves = {name: image - content for name, image in images.items()}
    expected = moves["ImageNet's mean and std"]
    assert np.abs(expected).max() > 0.004  # a level of 255: the step shows
    for name, move in moves.items():
        # Adam's first step has the sign of the gradient, which rounding may turn where the gradient is almost zero.
        assert np.median(np.abs(move - expected)) < 1e-5, name
        assert np.linalg.norm(move - expected) < 0.01 * np.linalg.norm(expected), name


def test_normalized_images_are_refused():
    variables = random_variables(MODEL, 32, 32, 3)
    content, style = pixels(2)
    with raises_user_error("style has values of float32 from -", "expected floats from 0 to 1: divide the pixels"):
        style_transfer(MODEL, variables, content, normalize(style, IMAGENET), IMAGENET)


def test_unknown_optimizer_is_refused():
    content, style = pixels(2)
    with raises_user_error("the optimizer is 'sgd'; expected one of lbfgs, adam"):
        style_transfer(MODEL, {}, content, style, IMAGENET, optimizer="sgd")
