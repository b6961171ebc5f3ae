"""Files of Keras of every size and generation give Keras' own answers, or a refusal that names the layer."""

import re

import numpy as np
import pytest

from tests.conftest import raises_user_error, relative_error
from tests.weights.keras_networks import (
    SUFFIXES,
    authors,
    check_predictions,
    check_representations,
    dense,
    keras_output,
    raw_images,
    save,
)
from vgg_jax import load
from vgg_jax.cli import convert
from vgg_jax.data.preprocessing import AUTHORS
from vgg_jax.weights.formats import load_file


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("side", "widths"), [(64, (24, 16, 5)), (150, (24, 5))], ids=["64", "150"])
def test_predictions_equal_keras_at_other_sizes(side, widths, suffix, keras, trunk, tmp_path):
    net = check_predictions(keras, dense(keras, trunk(side), widths), tmp_path / f"net{suffix}", side)
    assert (net.model.pool_size, net.model.hidden, net.model.num_classes) == (side // 32, widths[:-1], 5)
    assert net.outputs == "softmax"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("pool", ["Average", "Max"])
def test_global_pools_equal_keras(pool, suffix, keras, trunk, tmp_path):
    base = trunk(64)
    pooled = getattr(keras.layers, f"Global{pool}Pooling2D")()(base.output)
    net = check_representations(keras, keras.Model(base.input, pooled), tmp_path / f"net{suffix}", 64)
    assert (net.model.pool_size, net.model.hidden, net.model.num_classes) == (1, (), None)
    assert net.model.head_pool == pool.lower()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("flatten", [True, False])
def test_nested_models_equal_keras(flatten, suffix, keras, trunk, tmp_path, capsys):
    """The base is frozen except for its last stage, so legacy files list the last stage first."""
    layers, base = keras.layers, trunk(64)
    for layer in base.layers[:-4]:
        layer.trainable = False
    pool = layers.Flatten() if flatten else layers.GlobalAveragePooling2D()
    head = [layers.RandomFlip(), base, pool, layers.Dense(12, "relu"), layers.Dropout(0.3), layers.Dense(3, "softmax")]
    network = keras.Sequential([keras.Input((64, 64, 3)), *head])
    net = check_predictions(keras, network, tmp_path / f"net{suffix}", 64)
    assert (net.model.pool_size, net.model.hidden, net.model.num_classes) == (2 if flatten else 1, (12,), 3)
    assumed = "states no activations: ReLU after the hidden dense layers and softmax after the last is assumed"
    assert (assumed in capsys.readouterr().err) == (suffix == ".weights.h5")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", ["64", "150", "fc1 of 256"])
def test_full_networks_with_heads_equal_keras(kind, suffix, keras, tmp_path):
    side = 64 if kind == "64" else 150
    if kind == "fc1 of 256":
        base = keras.applications.VGG16(weights=None, include_top=False, input_shape=(side, side, 3))
        network = dense(keras, base, (256, 7))
    else:
        network = keras.applications.VGG16(weights=None, input_shape=(side, side, 3), classes=7)
    check_predictions(keras, network, tmp_path / f"net{suffix}", side)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_full_networks_without_head_equal_keras(pooling, suffix, keras, tmp_path):
    network = keras.applications.VGG16(weights=None, include_top=False, input_shape=(64, 64, 3), pooling=pooling)
    check_representations(keras, network, tmp_path / f"net{suffix}", 64)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_networks_without_pool_give_the_flattened_map(suffix, keras, trunk, tmp_path):
    """A file of weights does not state the images' size, so the pool is torchvision's."""
    base = trunk(64)
    if suffix == ".weights.h5":
        assert load_file(save(base, tmp_path / f"net{suffix}")).model.pool_size == 7
    else:
        check_representations(keras, base, tmp_path / f"net{suffix}", 64)


@pytest.mark.parametrize(
    ("options", "outputs"),
    [
        (dict(activation="sigmoid"), "sigmoid"),
        (dict(activation=None), "values"),
        (dict(activation="softmax"), "softmax"),
    ],
    ids=["sigmoid", "values", "softmax"],
)
def test_last_activation_states_the_outputs(options, outputs, keras, trunk, tmp_path, capsys):
    network = dense(keras, trunk(32), (4,), flatten=False, **options)
    assert load(save(network, tmp_path / "a.keras")).outputs == outputs
    assert ("has no activation, so the outputs are taken for values" in capsys.readouterr().err) == (
        outputs == "values"
    )


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_loss_of_logits_states_the_outputs(suffix, keras, trunk, tmp_path):
    losses = keras.losses
    for loss, outputs in ((losses.SparseCategoricalCrossentropy, "softmax"), (losses.BinaryCrossentropy, "sigmoid")):
        network = dense(keras, trunk(32), (4,), activation=None)
        network.compile(loss=loss(from_logits=True))
        assert load(save(network, tmp_path / f"a{suffix}")).outputs == outputs


def test_single_output_of_weights_is_taken_for_a_sigmoid(keras, trunk, tmp_path, capsys):
    network = dense(keras, trunk(32), (4, 1), activation="sigmoid")
    assert load(save(network, tmp_path / "a.weights.h5")).outputs == "sigmoid"
    assert "sigmoid after the last is assumed" in capsys.readouterr().err


def test_average_pools_without_settings_are_refused(keras, trunk, tmp_path):
    layers, base = keras.layers, trunk(64)
    x = layers.Flatten()(layers.AveragePooling2D((2, 2), name="average_pooling2d")(base.output))
    network = keras.Model(base.input, layers.Dense(3, "softmax", use_bias=False)(x))
    check_predictions(keras, network, tmp_path / "net.keras", 64)
    with raises_user_error("has the layers average_pooling2d and does not state their settings"):
        load(save(network, tmp_path / "net.weights.h5"))


def test_subclassed_models_are_read_as_weights(keras, trunk, tmp_path, capsys):
    class Classifier(keras.Model):
        def __init__(self, base):
            super().__init__()
            self.base, self.pool = base, keras.layers.GlobalAveragePooling2D()
            self.out = keras.layers.Dense(3, "softmax")

        def call(self, images):
            return self.out(self.pool(self.base(images)))

        def get_config(self):
            return {}

    network = Classifier(trunk(32))
    network(np.zeros((1, 32, 32, 3), np.float32))
    check_predictions(keras, network, tmp_path / "net.keras", 32)
    assert "softmax after the last is assumed" in capsys.readouterr().err


def test_activation_layers_count_as_activations(keras, trunk, tmp_path):
    """Convolutions, hidden and last layers have their activations as layers of their own."""
    layers = keras.layers
    x = inputs = keras.Input((32, 32, 3))
    for layer in trunk(32).layers[1:]:
        if isinstance(layer, layers.Conv2D):
            x = layers.ReLU()(layers.Conv2D(layer.filters, 3, padding="same")(x))
        else:
            x = layers.MaxPooling2D()(x)
    x = layers.Activation("relu")(layers.Dense(6)(layers.Flatten()(x)))
    network = keras.Model(inputs, layers.Softmax()(layers.Dense(3)(x)))
    net = check_predictions(keras, network, tmp_path / "net.keras", 32)
    assert (net.model.hidden, net.outputs) == ((6,), "softmax")


def test_fewer_pools_are_read_off_the_configuration(keras, trunk, tmp_path):
    x = inputs = keras.Input((32, 32, 3))
    for layer in trunk(32).layers[1:]:
        if layer.name not in ("block4_pool", "block5_pool"):
            x = layer.__class__.from_config(layer.get_config())(x)
    network = keras.Model(inputs, keras.layers.Dense(3, "softmax")(keras.layers.Flatten()(x)))
    net = check_predictions(keras, network, tmp_path / "net.keras", 32)
    assert (net.model.pool_after, net.model.pool_size) == ((1, 2, 3), 4)
    with raises_user_error("has 3 max pools and does not state where"):
        load(save(network, tmp_path / "net.weights.h5"))


def test_last_hidden_layer_is_the_representation(keras, trunk, tmp_path):
    base = trunk(64)
    x = keras.layers.Flatten()(base.output)
    for name in ("fc1", "fc2"):
        x = keras.layers.Dense(12, "relu", name=name)(x)
    for suffix in SUFFIXES:
        net = check_representations(keras, keras.Model(base.input, x), tmp_path / f"net{suffix}", 64)
        assert (net.model.hidden, net.model.num_classes) == ((12, 12), None)


def test_wrong_image_sizes_are_refused(keras, trunk, tmp_path, capsys):
    """Keras flattens the 4x4 map of 150x150 pixels and has no adaptive pool for others."""
    path = save(dense(keras, trunk(150), (5,)), tmp_path / "net.keras")
    with raises_user_error("takes images of 128 to 159 pixels a side", "crops 224", "crop=SIDE"):
        load(path, preprocessing=AUTHORS)
    assert "takes images of 150x150 pixels" in capsys.readouterr().err
    assert convert.main([str(path), str(tmp_path / "net.safetensors"), "--preprocessing", "cifar10"]) == 2
    assert "takes images of 128 to 159 pixels a side; found" in capsys.readouterr().err
    assert load(path, preprocessing=AUTHORS, features_only=True).model.num_classes is None
    target = str(tmp_path / "out.safetensors")
    command = [str(path), target, "--preprocessing", "authors"]
    assert convert.main(command) == 2
    assert "add --resize SIDE --crop SIDE" in capsys.readouterr().err
    assert convert.main([*command, "--resize", "150", "--crop", "150"]) == 0
    for suffix in ("safetensors", "pth"):  # the limit stays with the network, also if its preprocessing is unknown
        load(path).save(tmp_path / f"again.{suffix}")
        with raises_user_error("takes images of 128 to 159 pixels a side", "crops 224"):
            load(tmp_path / f"again.{suffix}", preprocessing=AUTHORS)
    assert load(target).preprocessing == authors(150)
    pooled = save(dense(keras, trunk(150), (5,), flatten=False), tmp_path / "pooled.keras")
    assert load(pooled, preprocessing=AUTHORS).model.pool_size == 1  # any size


def test_preprocessing_is_unknown_for_other_networks(keras, trunk, tmp_path):
    path = save(dense(keras, trunk(64), (5,)), tmp_path / "net.keras")
    net = load(path)
    assert net.preprocessing is None
    with raises_user_error("does not state the preprocessing of its images"):
        net.predict(raw_images(64))


def test_layers_before_the_convolutions_are_named(keras, trunk, tmp_path, capsys):
    layers, base = keras.layers, trunk(64)
    scaled = keras.Sequential([keras.Input((64, 64, 3)), layers.Rescaling(1 / 255), base, layers.Flatten()])
    load(save(scaled, tmp_path / "scaled.keras"))
    assert "left out before block1_conv1: rescaling (scale 0.0039" in capsys.readouterr().err
    load(save(scaled, tmp_path / "scaled.weights.h5"))
    assert "has the layers rescaling; the preprocessing must do their work" in capsys.readouterr().err
    inputs = keras.Input((64, 64, 3))
    x = base(keras.applications.vgg16.preprocess_input(inputs))
    load(save(keras.Model(inputs, layers.GlobalMaxPooling2D()(x)), tmp_path / "operations.keras"))
    assert re.search(r"left out before block1_conv1: get_item\w*, .*stack\w*, add", capsys.readouterr().err)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", ["BatchNormalization", "LeakyReLU", "Lambda", "Concatenate", "three hidden", "tanh"])
def test_heads_that_vgg_has_not_are_refused_by_name(kind, suffix, keras, trunk, tmp_path, capsys):
    layers, base = keras.layers, trunk(64)
    x = layers.Flatten()(base.output)
    if kind == "three hidden":
        for width in (8, 8, 8):
            x = layers.Dense(width, "relu")(x)
    elif kind == "tanh":
        x = layers.Dense(8, "tanh", name="squashed")(x)
    elif kind == "Concatenate":
        x = layers.Concatenate(name="joined")([x, layers.GlobalAveragePooling2D()(base.output)])
    elif kind == "Lambda":
        x = layers.Lambda(lambda x: x * 2, output_shape=(2 * 2 * 64,), name="doubled")(x)
    else:
        x = getattr(layers, kind)(name="odd")(layers.Dense(8)(x))
    path = save(keras.Model(base.input, layers.Dense(3, "softmax")(x)), tmp_path / f"net{suffix}")
    names = dict(Lambda="doubled", Concatenate="joined", tanh="squashed") | {"three hidden": "3 hidden dense layers"}
    if suffix == ".weights.h5" and kind in ("Lambda", "tanh"):
        load(path)  # the file does not state the function, and the note names the assumption
        assert "softmax after the last is assumed" in capsys.readouterr().err
        return
    if suffix == ".weights.h5" and kind == "Concatenate":
        names["Concatenate"] = "takes 320 numbers; expected 64"
    with raises_user_error(names.get(kind, "odd")):
        load(path)
    if kind != "Concatenate" and not (suffix == ".weights.h5" and kind == "BatchNormalization"):
        net = load(path, features_only=True)
        assert net.model.num_classes is None
        assert "the head is left out: dense" in capsys.readouterr().err or kind == "tanh"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (dict(activation="elu"), "follows an activation elu"),
        (dict(padding="valid"), "has padding valid"),
        (dict(dilation_rate=2), "has dilation_rate [2, 2]"),
    ],
    ids=["activation", "padding", "dilation"],
)
def test_other_convolutions_are_refused_by_name(options, problem, keras, trunk, tmp_path):
    with raises_user_error("its layer block", problem):
        load(save(trunk(300, **options), tmp_path / "net.keras"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_networks_give_the_maps_of_keras(suffix, keras, trunk, tmp_path, capsys):
    """As for style transfer: up to a convolution inside a stage, at its end, or up to its pool."""
    base = trunk(32)
    for layer, final in (("block4_conv1", "relu4_1"), ("block4_conv3", "relu4_3"), ("block3_pool", "pool3")):
        part = keras.Model(base.input, base.get_layer(layer).output)
        net = load(save(part, tmp_path / f"net{suffix}"), preprocessing=authors(32))
        assert (net.model.depth, net.model.final_layer, net.model.num_classes) == (16, final, None)
        assert f"up to {final}" in capsys.readouterr().err
        images = raw_images(32)
        maps = net(np.stack([net.preprocess(image) for image in images]))
        assert relative_error(maps, keras_output(keras, part, images)) < 1e-5


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_heads_of_truncated_networks_are_refused(suffix, keras, trunk, tmp_path, capsys):
    base = trunk(32)
    pooled = keras.layers.GlobalAveragePooling2D(name="averages")(base.get_layer("block4_conv3").output)
    for output in (pooled, keras.layers.Dense(3, name="odd")(pooled)):
        path = save(keras.Model(base.input, output), tmp_path / f"net{suffix}")
        with raises_user_error("its convolutions end with block4_conv3, and ", " follows", "features_only=True"):
            load(path)
        assert load(path, features_only=True).model.final_layer == "relu4_3"


def test_networks_with_automatic_names_are_read_by_shapes(keras, trunk, tmp_path, capsys):
    for suffix in SUFFIXES:
        check_representations(
            keras, trunk(32, names=None), tmp_path / f"net{suffix}", 32
        ) if suffix != ".weights.h5" else (load(save(trunk(32, names=None), tmp_path / f"net{suffix}")))
        stated = "the convolutions have no names of a VGG" in capsys.readouterr().err
        assert stated == (suffix == ".weights.h5")
