"""Strides, channels and receptive fields of the named layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgg_jax import VGG
from vgg_jax.features import layer_activations
from vgg_jax.model import PLAIN, TABLE_1

COLUMNS = {
    "A": dict(depth=11),
    "A-LRN": dict(depth=11, lrn=True),
    "B": dict(depth=13),
    "C": dict(depth=16, conv1x1=True),
    "D": dict(depth=16),
    "E": dict(depth=19),
}

# Worked by hand. A 3x3 kernel adds twice the stride to the receptive field, a pool adds the stride and doubles it.
# fmt: off
RECEPTIVE_FIELDS = {
    "A": {"conv1_1": 3, "pool1": 4, "conv2_1": 8, "pool2": 10, "conv3_1": 18, "conv3_2": 26, "pool3": 30,
          "conv4_1": 46, "conv4_2": 62, "pool4": 70, "conv5_1": 102, "conv5_2": 134, "pool5": 150,
          "fc6": 342, "fc7": 342, "fc8": 342},
    "B": {"conv1_1": 3, "conv1_2": 5, "pool1": 6, "conv2_1": 10, "conv2_2": 14, "pool2": 16, "conv3_1": 24,
          "conv3_2": 32, "pool3": 36, "conv4_1": 52, "conv4_2": 68, "pool4": 76, "conv5_1": 108, "conv5_2": 140,
          "pool5": 156, "fc6": 348, "fc7": 348, "fc8": 348},
    "C": {"conv1_1": 3, "conv1_2": 5, "pool1": 6, "conv2_1": 10, "conv2_2": 14, "pool2": 16, "conv3_1": 24,
          "conv3_2": 32, "conv3_3": 32, "pool3": 36, "conv4_1": 52, "conv4_2": 68, "conv4_3": 68, "pool4": 76,
          "conv5_1": 108, "conv5_2": 140, "conv5_3": 140, "pool5": 156, "fc6": 348, "fc7": 348, "fc8": 348},
    "D": {"conv1_1": 3, "conv1_2": 5, "pool1": 6, "conv2_1": 10, "conv2_2": 14, "pool2": 16, "conv3_1": 24,
          "conv3_2": 32, "conv3_3": 40, "pool3": 44, "conv4_1": 60, "conv4_2": 76, "conv4_3": 92, "pool4": 100,
          "conv5_1": 132, "conv5_2": 164, "conv5_3": 196, "pool5": 212, "fc6": 404, "fc7": 404, "fc8": 404},
    "E": {"conv1_1": 3, "conv1_2": 5, "pool1": 6, "conv2_1": 10, "conv2_2": 14, "pool2": 16, "conv3_1": 24,
          "conv3_2": 32, "conv3_3": 40, "conv3_4": 48, "pool3": 52, "conv4_1": 68, "conv4_2": 84, "conv4_3": 100,
          "conv4_4": 116, "pool4": 124, "conv5_1": 156, "conv5_2": 188, "conv5_3": 220, "conv5_4": 252, "pool5": 268,
          "fc6": 460, "fc7": 460, "fc8": 460},
}
RECEPTIVE_FIELDS["A-LRN"] = RECEPTIVE_FIELDS["A"] | {"lrn1": 3}  # it works across channels
CHANNELS = {1: 64, 2: 128, 3: 256, 4: 512, 5: 512, 6: 4096, 7: 4096, 8: 1000}  # of stages and fully connected layers
PADDINGS = {  # pixels before the edge at the end of each stage: one stride for each 3x3 kernel
    "A": (1, 3, 11, 27, 59), "A-LRN": (1, 3, 11, 27, 59), "B": (2, 6, 14, 30, 62), "C": (2, 6, 14, 30, 62),
    "D": (2, 6, 18, 42, 90), "E": (2, 6, 22, 54, 118),
}
# fmt: on


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("column", TABLE_1)
def test_geometry_equals_numbers_worked_by_hand(column, batch_norm):
    geometry = VGG(**COLUMNS[column], batch_norm=batch_norm).layer_geometry
    by_hand = RECEPTIVE_FIELDS[column]
    for name, layer in geometry.items():
        stage = int(name.strip("abcdefghijklmnopqrstuvwxyz")[0])
        same = name.replace("bn", "conv").replace("relu", "conv").replace("drop", "fc")
        same = same if stage < 6 else same.replace("conv", "fc")
        assert layer.receptive_field == by_hand[same], name
        assert layer.channels == CHANNELS[stage], name
        assert layer.stride == (32 if stage > 5 else 2 ** (stage - ("pool" not in name))), name
        if "pool" in name:
            assert layer.padding == PADDINGS[column][stage - 1]
    assert set(by_hand) <= set(geometry)
    assert geometry["fc8"].padding == PADDINGS[column][-1]


def output_of_one_position(model, params, layer, position):
    """Return the function from a square image of one channel to the sum of a position's channels."""

    def output(image):
        maps = layer_activations(model, {"params": params}, image[None, :, :, None], layer, average_pool=True)
        return maps[layer][0, position, position].sum()

    return output


@pytest.mark.parametrize("column", [*(pytest.param(c, marks=pytest.mark.slow) for c in ("A-LRN", "C")), "D"])
def test_gradient_of_one_position_reaches_its_pixels(column, narrow):
    """Kernels and pixels are positive and average pools pass a gradient to their whole window, so it is zero nowhere.

    The image has as many pixels as the receptive field of the deepest layer, at most.
    """
    model = VGG(**COLUMNS[column], num_classes=None, hidden=(), layers=PLAIN)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 1)))["params"]
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 1 / np.prod(leaf.shape[:-1]), np.float32), shapes)
    for layer, side in (("relu2_1", 24), ("pool3", 64), ("relu4_2", 112), ("relu5_2", 192)):
        geometry = model.layer_geometry[layer]
        for position in (0, side // geometry.stride // 2):
            gradient = jax.grad(output_of_one_position(model, params, layer, position))(jnp.ones((side, side)))
            expected = np.isin(np.arange(side), geometry.pixels(position))
            assert not expected.all()
            np.testing.assert_array_equal(np.asarray(gradient) != 0, expected[:, None] & expected)


def test_dense_layer_reaches_its_pixels(narrow):
    """A network without padding to hide an error: fc6 slides over the map, as timm's head does."""
    model = VGG(11, pool_after=(1, 2), conv_head=True, pool_size=3, hidden=(4, 4), num_classes=2, layers=PLAIN)
    geometry = model.layer_geometry
    assert geometry["fc6"] == (4, 4, geometry["pool2"].receptive_field + 2 * 4 * 6 + 2 * 4, 3 + 4 * 6)
    assert geometry["global_pool"] == geometry["fc7"]._replace(channels=4)


@pytest.mark.parametrize("size", [(32, 32), (37, 50), (65, 97), (224, 225)])
def test_maps_have_the_image_divided_by_the_stride(size, narrow):
    """The stages of a backbone, for images of any size."""
    model = VGG(16, batch_norm=True, num_classes=None, hidden=())
    names = [layer.name for stage in model.stages for layer in stage]
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    maps = jax.eval_shape(lambda *arguments: layer_activations(model, *arguments, names), variables, images)
    for name in names:
        geometry = model.layer_geometry[name]
        assert maps[name].shape == (2, size[0] // geometry.stride, size[1] // geometry.stride, geometry.channels)


def test_left_out_pools_change_strides(narrow):
    """A network for small images, and the shorter ones that end at a layer."""
    geometry = VGG(16, pool_after=(1, 3)).layer_geometry
    assert [geometry[f"conv{s}_1"].stride for s in range(1, 6)] == [1, 2, 2, 4, 4]
    short = VGG(16, num_classes=None, hidden=(), final_layer="relu3_1").layer_geometry
    assert list(short)[-1] == "relu3_1"
    assert short["relu3_1"] == (32, 4, 24, 10)
