"""Networks of Keras, their files, and comparisons with ours."""

import dataclasses

import numpy as np

from tests.conftest import relative_error
from vgg_jax import load
from vgg_jax.data.preprocessing import AUTHORS

SUFFIXES = (".h5", ".weights.h5", ".keras")


def dense(keras, base, widths, flatten=True, **options):
    """Return the network with a head: Flatten or a global average, and dense layers with the names of Keras' VGG."""
    x = (keras.layers.Flatten() if flatten else keras.layers.GlobalAveragePooling2D())(base.output)
    for i, width in enumerate(widths[:-1], 1):
        x = keras.layers.Dropout(0.5)(keras.layers.Dense(width, "relu", name=f"fc{i}")(x))
    return keras.Model(base.input, keras.layers.Dense(widths[-1], **dict(activation="softmax") | options)(x))


def save(network, path):
    (network.save_weights if str(path).endswith(".weights.h5") else network.save)(path)
    return path


def authors(side):
    return dataclasses.replace(AUTHORS, resize=side, crop=side)


def raw_images(side):
    return np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)


def keras_output(keras, network, images):
    return np.asarray(network(keras.applications.vgg16.preprocess_input(images.astype(np.float32)), training=False))


def check_predictions(keras, network, path, side, **options):
    """Compare the probabilities of raw images, through `load` and `predict`."""
    images = raw_images(side)
    net = load(save(network, path), preprocessing=authors(side), **options)
    expected = keras_output(keras, network, images)
    found = np.zeros_like(expected)
    for row, prediction in zip(found, net.predict(images, top=expected.shape[1]), strict=True):
        row[list(prediction.labels)] = prediction.probabilities
    assert relative_error(found, expected) < 1e-5
    return net


def check_representations(keras, network, path, side):
    """Compare the outputs of a network without classes."""
    net = load(save(network, path), preprocessing=authors(side))
    images = raw_images(side)
    ours = net(np.stack([net.preprocess(image) for image in images]))
    assert relative_error(ours, keras_output(keras, network, images).reshape(len(images), -1)) < 1e-5
    return net
