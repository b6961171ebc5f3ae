"""Fixtures of the tests of weights: Keras and its convolutional parts."""

import os
import types

import pytest

from tests.narrow import NARROW_TABLE


@pytest.fixture(scope="session")
def keras():
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    return keras


@pytest.fixture
def narrow_applications(keras, narrow, monkeypatch):
    """Return keras.applications, whose VGG-16 and VGG-19 have an eighth of their channels and of their dense units."""
    import keras.src.applications as source

    def conv(filters, *arguments, **options):
        return keras.layers.Conv2D(filters // 8, *arguments, **options)

    def dense(units, **options):
        return keras.layers.Dense(units // 8 if units == 4096 else units, **options)

    shim = types.SimpleNamespace(**vars(keras.src.layers))
    shim.Conv2D, shim.Dense = conv, dense
    for module in (source.vgg16, source.vgg19):
        monkeypatch.setattr(module, "layers", shim)
    monkeypatch.setattr("vgg_jax.weights.imagenet_classes.HIDDEN", (512, 512))
    return keras.applications


@pytest.fixture
def trunk(keras, narrow):
    """Return a function that makes VGG-16's convolutional part with an eighth of the channels."""

    def make(side, names="block{s}_conv{i}", **options):
        keras.utils.set_random_seed(0)
        x = inputs = keras.Input((side, side, 3))
        # Pixels are not divided by 255; logits near 1 keep the rounding errors of probabilities small.
        kernels = [keras.initializers.RandomNormal(stddev=0.001)] + ["he_normal"] * 12
        for s, widths in enumerate(NARROW_TABLE["D"], 1):
            for i, width in enumerate(widths, 1):
                settings = dict(padding="same", activation="relu", bias_initializer="random_normal") | options
                name = names and names.format(s=s, i=i)
                x = keras.layers.Conv2D(width, 3, kernel_initializer=kernels.pop(0), name=name, **settings)(x)
            x = keras.layers.MaxPooling2D(name=names and f"block{s}_pool")(x)
        return keras.Model(inputs, x, name="vgg16")

    return make
