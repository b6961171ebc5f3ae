"""The evaluation of the first stages for a part of the batch at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.narrow import NARROW_TABLE
from tests.ops.reference import normal
from vgg_jax import VGG
from vgg_jax import model as model_module
from vgg_jax.ops import batch_parts

FLOAT64 = dict(dtype=jnp.float64, param_dtype=jnp.float64)
TRUNK = dict(num_classes=None, hidden=(), final_layer="relu3_1")  # so short that it compiles fast
MODEL = VGG(depth=11, batch_norm=True, **TRUNK, **FLOAT64)


@pytest.fixture
def in_parts(monkeypatch):
    """Make a narrow network on one device compute batches of 32x32 in parts of at most two images."""
    monkeypatch.setattr(model_module, "TABLE_1", NARROW_TABLE)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    channels = NARROW_TABLE["A"][0][0]

    def set_part(images):
        monkeypatch.setattr(batch_parts, "LARGEST_MAP", images * 32 * 32 * channels * 8)

    set_part(2)
    return set_part


def drawn(count):
    images = jnp.asarray(normal(count, 32, 32, 3))
    return images, MODEL.init(jax.random.key(0), images)


def scans(function, *arguments):
    return "scan[" in str(jax.make_jaxpr(function)(*arguments))


def test_parts_give_the_bits_of_the_whole_batch(in_parts, x64):
    images, variables = drawn(6)
    assert scans(MODEL.apply, variables, images)
    results = [jax.jit(lambda v, x: MODEL.apply(v, x))(variables, images)]
    in_parts(1000)
    assert not scans(lambda v, x: MODEL.apply(v, x), variables, images)
    results.append(jax.jit(lambda v, x: MODEL.apply(v, x))(variables, images))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("differentiate", [jax.grad, jax.jacfwd], ids=["reverse", "forward"])
@pytest.mark.parametrize("place", [0, 1], ids=["variables", "images"])
def test_derivatives_are_those_of_the_whole_batch(place, differentiate, in_parts, x64):
    images, variables = drawn(4)
    scale = jnp.ones(())

    def loss(scale, variables, images):
        moved = (jax.tree.map(lambda a: a * scale, variables), images) if place == 0 else (variables, images * scale)
        return jnp.square(MODEL.apply(*moved)).sum()

    results = [jax.jit(differentiate(loss))(scale, variables, images)]
    in_parts(1000)
    results.append(jax.jit(differentiate(lambda *a: loss(*a)))(scale, variables, images))
    np.testing.assert_allclose(*results, rtol=1e-12)  # rounding of float64


def test_gradient_of_images_needs_none_of_kernels(in_parts, x64):
    images, variables = drawn(4)
    text = str(jax.make_jaxpr(jax.grad(lambda images: MODEL.apply(variables, images).sum()))(images))
    assert "conv3x3_kernel_gradient" not in text
    assert "wanted=(True, True" not in text


def test_outputs_and_training_take_the_whole_batch(in_parts, x64):
    images, variables = drawn(4)
    assert not scans(lambda v, x: MODEL.apply(v, x, mutable=["intermediates"]), variables, images)
    assert not scans(lambda v, x: MODEL.apply(v, x, train=True, mutable=["batch_stats"]), variables, images)
    assert not scans(lambda v, x: MODEL.apply(v, x, last_layer="pool2"), variables, images)
    assert scans(lambda v, x: MODEL.apply(v, x, last_layer="conv3_1"), variables, images)


def test_several_devices_share_the_whole_batch(in_parts, monkeypatch, x64):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    images, variables = drawn(4)
    assert not scans(MODEL.apply, variables, images)


@pytest.mark.parametrize(("count", "expected"), [(2, 1), (6, 3), (8, 4), (9, 1), (1, 1)])
def test_number_of_parts_follows_the_size_of_the_map(count, expected, monkeypatch):
    """A part has two of the images, which is the most that fits; nine images have no part of two."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(batch_parts, "LARGEST_MAP", 2 * 32 * 32 * 8 * 4 + 1)
    assert batch_parts.number_of_parts(jnp.zeros((count, 32, 32, 3)), 8) == expected
