"""Style transfer moves the Gram matrices of an image towards those of the style, and keeps the content."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.conftest import photographs, random_variables, relative_error
from vgg_jax import VGG
from vgg_jax.data.preprocessing import IMAGENET
from vgg_jax.features import gram_matrix, layer_activations, style_transfer

MODEL = VGG(depth=11, num_classes=10, pool_size=1, hidden=())


def test_style_weight_balances_content_and_style():
    variables = random_variables(MODEL, 32, 32, 3)
    content, style = (jnp.asarray(IMAGENET.uncropped(image, 48))[None] for image in photographs(2))

    layers = ["conv1_1", "conv2_1", "conv3_1", "conv4_2"]
    maps = jax.jit(functools.partial(layer_activations, MODEL, layers=layers, average_pool=True))

    def distances(image):
        """Return the distances from the content's activations and from the style's Gram matrices."""
        found, own, wanted = (maps(variables, x) for x in (image, content, style))
        found_grams, wanted_grams = ([gram_matrix(maps[name]) for name in layers[:3]] for maps in (found, wanted))
        return relative_error(found["conv4_2"], own["conv4_2"]), relative_error(found_grams, wanted_grams)

    images = [
        style_transfer(MODEL, variables, content, style, style_weight=weight, steps=30, learning_rate=0.05)
        for weight in (0.0, 1.0, 1000.0)
    ]
    np.testing.assert_array_equal(images[0], content)  # nothing to gain
    assert images[1].shape == content.shape
    (_, start), (near, some), (far, most) = map(distances, images)
    assert most < some < start
    assert most < 0.5 * start
    assert near < far
