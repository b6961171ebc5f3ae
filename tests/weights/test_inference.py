"""Networks optimized for inference: the same function in float32, kernels in another form, and no training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vgg_jax.ops.inference_layers as inference
from tests.conftest import raises_user_error, relative_error
from tests.weights.test_folding import network
from vgg_jax import CIFAR10, VGG, Network, optimize_for_inference
from vgg_jax.evaluation.optimized import FIRST_IMAGES
from vgg_jax.features.activations import layer_activations
from vgg_jax.model import PLAIN
from vgg_jax.ops import batch_parts
from vgg_jax.ops.conv3x3 import conv3x3
from vgg_jax.ops.inference_layers import convolution, kernel_form, kernel_shape
from vgg_jax.weights.folding import fold_batch_norm

METHODS = ("direct", "im2col", "winograd2", "winograd4", "winograd6", "karatsuba")
# Rounding of float32: the sums of a layer have up to 4,608 terms, and Winograd's algorithm multiplies it by a few.
TOLERANCE = 1e-5


def images_of(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def fast_methods(narrow, monkeypatch):
    """Let layers of any work take the fast methods, as those of full networks do."""
    monkeypatch.setattr(inference, "SMALLEST_WORK", 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (2, 2), (5, 7), (12, 9)])
def test_every_form_computes_maps_of_every_size(method, size, x64):
    random = np.random.default_rng(0)
    kernel, bias = random.normal(size=(3, 3, 5, 6)), random.normal(size=6)
    x = random.normal(size=(2, *size, 5))
    form = kernel_form(kernel, method, np.float64)
    assert form.shape == kernel_shape(kernel.shape, method)
    expected = conv3x3(*map(jnp.asarray, (x, kernel, bias)))
    assert relative_error(convolution(*map(jnp.asarray, (x, form, bias))), expected) < 1e-12


@pytest.mark.parametrize("rows", [2, 4, 6])
def test_bands_give_the_whole_map(rows, monkeypatch, x64):
    random = np.random.default_rng(0)
    kernel, bias = random.normal(size=(3, 3, 5, 6)), random.normal(size=6)
    x = jnp.asarray(random.normal(size=(2, 33, 20, 5)))
    monkeypatch.setattr(inference, "LARGEST_MAP", 0)
    monkeypatch.setattr(inference, "LARGEST_BAND", 2 * rows * 2 * 20 * 6 * 8)
    form = jnp.asarray(kernel_form(kernel, f"winograd{rows}", np.float64))
    expected = conv3x3(x, jnp.asarray(kernel), jnp.asarray(bias))
    assert relative_error(convolution(x, form, jnp.asarray(bias)), expected) < 1e-12


@pytest.mark.parametrize(
    ("shape", "features", "method"),
    [
        ((1, 224, 224, 3), 64, "direct"),
        ((1, 224, 224, 64), 64, "winograd6"),
        ((1, 28, 28, 512), 512, "winograd4"),
        ((1, 14, 14, 512), 512, "winograd2"),
        ((8, 14, 14, 512), 512, "winograd4"),
        ((1, 4, 4, 512), 512, "im2col"),
        ((64, 4, 4, 512), 512, "winograd2"),
        ((64, 8, 8, 512), 512, "winograd4"),
        ((1, 2, 2, 512), 512, "karatsuba"),
        ((1, 32, 32, 8), 8, "direct"),
    ],
)
def test_method_follows_the_map(shape, features, method):
    assert inference.choose_method(shape, features) == method


@pytest.mark.parametrize("fields", [{}, dict(batch_norm=False), dict(depth=16, conv1x1=True), dict(lrn=True)])
def test_optimized_network_computes_the_same_logits(fields, fast_methods):
    model, variables = network(**fields)
    optimized, replaced = optimize_for_inference(model, variables, (1, 32, 32, 3))
    assert not optimized.batch_norm
    for shape in ((1, 32, 32, 3), (3, 40, 33, 3)):
        images = images_of(*shape)
        expected = jax.jit(model.apply)(variables, images)
        assert relative_error(jax.jit(optimized.apply)(replaced, images), expected) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_parameters_of_other_dtypes_are_transformed(dtype, fast_methods):
    """As arrays of NumPy, because JAX has no float64 here."""
    model, variables = network(batch_norm=False)
    given = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype)), variables)
    optimized, replaced = optimize_for_inference(model, given, (1, 32, 32, 3))
    rounded = jax.tree.map(lambda leaf: leaf.astype(np.float32), given)
    images = images_of(1, 32, 32, 3)
    expected = jax.jit(model.apply)(rounded, images)
    assert relative_error(jax.jit(optimized.apply)(replaced, images), expected) < TOLERANCE


def test_kernels_are_replaced_and_the_head_is_shared(fast_methods):
    model, variables = network(batch_norm=False, depth=16)
    _, optimized = optimize_for_inference(model, variables, (1, 32, 32, 3))
    assert optimized["params"].keys() == variables["params"].keys()
    assert {name: set(leaves) for name, leaves in optimized["params"].items()} == {
        name: {"kernel", "bias"} for name in variables["params"]
    }
    assert optimized["params"]["conv2_2"]["kernel"].shape == (36, 16, 16)
    assert optimized["params"]["fc8"]["kernel"] is variables["params"]["fc8"]["kernel"]


def test_shapes_of_variables_give_shapes(fast_methods):
    model, variables = network(depth=16)
    _, optimized = optimize_for_inference(model, variables, (1, 32, 32, 3))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    _, abstract = optimize_for_inference(model, shapes, (1, 32, 32, 3))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), optimized) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract
    )


def test_parts_of_a_batch_give_the_logits(fast_methods, monkeypatch):
    model, variables = network()
    images = images_of(8, 32, 32, 3)
    optimized, replaced = optimize_for_inference(model, variables, images.shape)
    expected = optimized.apply(replaced, images)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(batch_parts, "LARGEST_MAP_OF_INFERENCE", 2 * 32 * 32 * 8 * 4)
    monkeypatch.setattr(batch_parts, "LARGEST_MAP", 8 * 16 * 16 * 16 * 4 - 1)
    assert "while" in jax.jit(optimized.apply).lower(replaced, images).as_text()
    assert relative_error(jax.jit(optimized.apply)(replaced, images), expected) < TOLERANCE


def test_optimized_network_gives_activations_and_last_layers(fast_methods):
    model, variables = network()
    images = images_of(2, 32, 32, 3)
    optimized, replaced = optimize_for_inference(model, variables, images.shape)
    layers = ("relu1_1", "pool3", "relu5_2", "fc6")
    found = layer_activations(optimized, replaced, images, layers)
    expected = layer_activations(model, variables, images, layers)
    assert all(relative_error(found[layer], expected[layer]) < TOLERANCE for layer in layers)
    last = optimized.apply(replaced, images, last_layer="relu2_1")
    assert relative_error(last, model.apply(variables, images, last_layer="relu2_1")) < TOLERANCE


def test_training_and_initialization_are_refused():
    model, variables = network(batch_norm=False)
    optimized, replaced = optimize_for_inference(model, variables, (1, 32, 32, 3))
    images = images_of(1, 32, 32, 3)
    with pytest.raises(ValueError, match="the network is optimized for inference; expected the original one: train"):
        optimized.apply(replaced, images, train=True, rngs={"dropout": jax.random.key(0)})
    with pytest.raises(ValueError, match="found no kernel of conv1_1; expected the variables"):
        optimized.init(jax.random.key(0), images)


def test_wrong_arguments_are_named():
    model, variables = network()
    with raises_user_error("computes in bfloat16", "expected float32", "pass model.clone(dtype=jnp.float32)"):
        optimize_for_inference(model.clone(dtype=jnp.bfloat16), variables, (1, 32, 32, 3))
    with raises_user_error("image_shape is (32, 32)", "expected (N, H, W, C) with H and W at least 32"):
        optimize_for_inference(model, variables, (32, 32))
    other = model.clone(layers=dataclasses.replace(PLAIN, pool=lambda x: x))
    with raises_user_error("layers or a sharding of its own", "expected the default layers"):
        optimize_for_inference(other, variables, (1, 32, 32, 3))


def test_optimized_network_is_its_own_optimum(fast_methods):
    first = optimize_for_inference(*network(), (1, 32, 32, 3))
    model, variables = optimize_for_inference(*first, (8, 32, 32, 3))
    assert model == first[0]
    assert jax.tree.leaves(variables) == jax.tree.leaves(first[1])


def doubled(variables):
    return jax.tree.map(lambda leaf: 2 * leaf, variables)


def test_network_is_optimized_again_when_variables_change(fast_methods):
    """The kept kernels are those of the arrays of the last call, however they were replaced."""
    model, variables = network(batch_norm=False)
    images = images_of(2, 32, 32, 3)
    net = Network(model, variables, None)
    assert relative_error(net(images), model.apply(variables, images)) < TOLERANCE
    other = dataclasses.replace(net, variables=doubled(variables))
    assert relative_error(other(images), model.apply(other.variables, images)) < TOLERANCE
    net.variables["params"]["conv1_1"] = doubled(net.variables["params"]["conv1_1"])
    assert relative_error(net(images), model.apply(net.variables, images)) < TOLERANCE
    net.variables["params"]["conv2_1"]["kernel"] = 3 * net.variables["params"]["conv2_1"]["kernel"]
    assert relative_error(net(images), model.apply(net.variables, images)) < TOLERANCE


def test_arrays_that_change_in_place_are_never_stale(fast_methods):
    model, variables = network(batch_norm=False)
    net = Network(model, jax.tree.map(lambda leaf: np.asarray(leaf).copy(), variables), None)
    images = images_of(2, 32, 32, 3)
    net(images)
    net.variables["params"]["conv1_1"]["kernel"][:] *= 2
    assert relative_error(net(images), jax.jit(model.apply)(net.variables, images)) < TOLERANCE


def test_network_keeps_two_choices_and_equal_kernels_once(fast_methods):
    model, variables = network(batch_norm=False)
    net = Network(model, variables, None)
    shapes = [(1, 32, 32, 3), (64, 32, 32, 3), (1, 64, 64, 3)]
    for shape in shapes:
        net(images_of(*shape))
    programs = net._programs
    kept = list(programs._kept.values())
    assert len(kept) == 2
    shared = [name for name in kept[0][1]["params"] if kept[0][1]["params"][name] is kept[1][1]["params"][name]]
    assert "conv1_1" in shared
    found = [programs.optimized(variables, jax.ShapeDtypeStruct(shapes[2], jnp.float32)) for _ in range(2)]
    assert found[0] is found[1]


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_other_dtypes_are_computed_as_before(dtype, fast_methods, x64):
    model, variables = network(dtype)
    net = Network(model, variables, None)
    images = images_of(2, 32, 32, 3)
    assert net._programs.optimized(variables, images) is None
    np.testing.assert_array_equal(net(images), jax.jit(model.apply)(variables, images))


def test_calls_inside_transformations_use_the_network_itself(fast_methods):
    model, variables = network(batch_norm=False)
    net = Network(model, variables, None)
    images = images_of(1, 32, 32, 3)
    gradient = jax.grad(lambda images: net(images).sum())(images)
    expected = jax.grad(lambda images: model.apply(variables, images).sum())(images)
    assert relative_error(gradient, expected) < TOLERANCE
    constant = jax.jit(lambda: net(images))()
    assert relative_error(constant, model.apply(variables, images)) < TOLERANCE


def test_predictions_after_the_first_are_optimized(fast_methods):
    net = Network(*network(), CIFAR10)
    images = np.random.default_rng(0).integers(0, 256, (FIRST_IMAGES, 32, 32, 3), np.uint8)
    first = net.predict(images[:1])[0]
    assert not net._programs._kept
    again = net.predict(images)[0]
    assert net._programs._kept
    np.testing.assert_allclose(again.probabilities, first.probabilities, atol=1e-4)


def torch_logits(model, variables, images):
    """Return the logits of PyTorch in float32."""
    import torch

    state = fold_batch_norm(model, variables)[1]["params"]
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        for layer in [layer for stage in model.stages for layer in stage]:
            if layer.kind == "conv":
                kernel = np.asarray(state[layer.name]["kernel"]).transpose(3, 2, 0, 1)
                weights = [torch.from_numpy(a.copy()) for a in (kernel, np.asarray(state[layer.name]["bias"]))]
                x = torch.nn.functional.conv2d(x, *weights, padding=1)
            elif layer.kind != "bn":
                x = torch.relu(x) if layer.kind == "relu" else torch.nn.functional.max_pool2d(x, 2)
        x = torch.nn.functional.adaptive_avg_pool2d(x, model.pool_size)
        x = x.permute(0, 2, 3, 1).flatten(1)
        for layer in model.head:
            if layer.kind == "dense":
                kernel, bias = (torch.from_numpy(np.array(state[layer.name][leaf])) for leaf in ("kernel", "bias"))
                x = x @ kernel + bias
            elif layer.kind == "relu":
                x = torch.relu(x)
    return x.numpy()


def he_variables(model, side):
    """Return random variables that keep the scale of maps, as float32."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, side, side, 3), np.float32))

    def leaf(path, shape):
        name, noise = path[-1].key, random.normal(size=shape.shape)
        if name == "kernel":
            return (noise * (2 / np.prod(shape.shape[:-1])) ** 0.5).astype(np.float32)
        return ((0.05 if name in ("bias", "mean") else 1) + 0.05 * np.abs(noise)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def errors(fields, side, count):
    """Return the errors of the logits in float32 against float64: of the optimized network, and of PyTorch."""
    model = VGG(**fields)
    variables, images = he_variables(model, side), images_of(count, side, side, 3)
    exact = model.clone(dtype=jnp.float64, param_dtype=jnp.float64, layers=PLAIN)
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables)
    expected = np.asarray(exact.apply(wide, images.astype(np.float64)))
    optimized, replaced = optimize_for_inference(model, variables, images.shape)
    found = jax.jit(optimized.apply)(replaced, images), torch_logits(model, variables, images)
    return [relative_error(np.asarray(logits, np.float64), expected) for logits in found]


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_error_is_at_most_three_times_pytorchs(depth, fast_methods, x64):
    ours, theirs = errors(dict(depth=depth, batch_norm=True, num_classes=10, pool_size=1, hidden=()), 32, 2)
    print(f"depth {depth}: {ours:.1e}, PyTorch {theirs:.1e}")
    assert ours < 3 * theirs


@pytest.mark.slow
@pytest.mark.parametrize("depth", [11, 13, 16, 19])
@pytest.mark.parametrize(("side", "count"), [(224, 1), (224, 2), (32, 1), (32, 64)])
def test_full_error_is_at_most_three_times_pytorchs(depth, side, count, x64):
    small = dict(batch_norm=True, num_classes=10, pool_size=1, hidden=())
    ours, theirs = errors(dict(depth=depth, **(small if side == 32 else {})), side, count)
    print(f"depth {depth}, {count} of {side}x{side}: {ours:.1e}, PyTorch {theirs:.1e}")
    assert ours < 3 * theirs
