"""The networks: sizes, names, initialization, fields, inputs and implementations of layers."""

import dataclasses
import functools
import itertools
import math
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import random_variables, relative_error
from vgg_jax import VGG
from vgg_jax.model import COLUMNS, FAST, PLAIN, TABLE_1, Layer
from vgg_jax.ops.normalization import BatchNorm

COUNTS = {  # torchvision's numbers of parameters by depth and batch norm
    (11, False): 132_863_336,
    (11, True): 132_868_840,
    (13, False): 133_047_848,
    (13, True): 133_053_736,
    (16, False): 138_357_544,
    (16, True): 138_365_992,
    (19, False): 143_667_240,
    (19, True): 143_678_248,
}
SMALL = dict(depth=11, num_classes=10, pool_size=1, hidden=())


def shapes(model, *image_shape):
    images = jax.ShapeDtypeStruct(image_shape or (1, 224, 224, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def count(model, *image_shape):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(model, *image_shape)["params"]))


@pytest.mark.parametrize(("depth", "batch_norm"), COUNTS)
def test_parameter_counts(depth, batch_norm):
    assert count(VGG(depth, batch_norm)) == COUNTS[depth, batch_norm]


def test_parameter_counts_of_other_columns_and_heads():
    assert count(VGG(16, conv1x1=True)) == 133_638_952
    assert count(VGG(11, lrn=True)) == COUNTS[11, False]
    assert count(VGG(16, True, num_classes=10, pool_size=1, hidden=()), 1, 32, 32, 3) == 14_728_266


def test_layers_have_the_papers_names():
    params = shapes(VGG(16, conv1x1=True))["params"]
    convolutions = [f"conv{s}_{i}" for s, count in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, count + 1)]
    assert set(params) == {*convolutions, "fc6", "fc7", "fc8"}
    assert params["conv3_3"]["kernel"].shape == (1, 1, 256, 256)
    assert params["fc6"]["kernel"].shape == (7 * 7 * 512, 4096)
    variables = shapes(VGG(11, batch_norm=True))
    assert set(variables["params"]["bn5_2"]) == {"scale", "bias"}
    assert set(variables["batch_stats"]["bn1_1"]) == {"mean", "var"}
    names = [layer.name for stage in VGG(11, lrn=True).stages for layer in stage]
    assert names[:5] == ["conv1_1", "relu1_1", "lrn1", "pool1", "conv2_1"]


def test_depths_are_the_numbers_of_layers_with_weights():
    for depth, column in COLUMNS.items():
        assert sum(map(len, TABLE_1[column])) + 3 == depth
        assert VGG(depth).column == column


def test_head_describes_the_dense_layers():
    head = VGG(11, hidden=(64,), num_classes=5).head
    assert head == [
        Layer("dense", "fc6", 64, 7),
        Layer("relu", "relu6"),
        Layer("dropout", "drop6"),
        Layer("dense", "fc8", 5, 1),
    ]
    assert VGG(11, pool_size=2, hidden=(), num_classes=5).head == [Layer("dense", "fc8", 5, 2)]
    assert VGG(11).head_layers == ("fc6", "fc7", "fc8")


@pytest.mark.parametrize("fields", [{}, dict(pool_size=3, hidden=(8,)), dict(hidden=(), num_classes=5)], ids=str)
def test_stages_and_head_give_the_shapes_of_all_kernels(fields):
    model, channels = VGG(16, conv1x1=True, **fields), 3
    params = shapes(model)["params"]
    for layer in (*itertools.chain(*model.stages), *model.head):
        if layer.kernel_size:
            kernel = params.pop(layer.name)["kernel"]
            window = (layer.kernel_size, layer.kernel_size)
            assert math.prod(kernel.shape) == math.prod((*window, channels, layer.features))
            channels = layer.features
    assert not params


def test_initialization_follows_torchvision():
    """Convolutions: normal with variance 2 / fan_out, not truncated. Dense layers: normal, 0.01. Biases: 0."""
    model = VGG(13, num_classes=10, hidden=(512, 512))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    for name, leaves in params.items():
        kernel = np.asarray(leaves["kernel"])
        std = 0.01 if name in model.head_layers else math.sqrt(2 / (9 * kernel.shape[-1]))
        # The standard deviation of n samples has a relative error of 1 / sqrt(2 n); five times that is allowed.
        assert abs(kernel.std() / std - 1) < 5 / math.sqrt(2 * kernel.size), name
        assert not leaves["bias"].any()
    assert np.abs(params["conv5_2"]["kernel"]).max() > 4 * math.sqrt(2 / (9 * 512))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(depth=15), "depth is 15; expected 11, 13, 16 or 19"),
        (dict(depth=16, lrn=True), "it needs depth 11, not 16"),
        (dict(depth=19, conv1x1=True), "it needs depth 16, not 19"),
        (dict(num_classes=0), "num_classes is 0"),
        (dict(pool_size=0), "pool_size is 0"),
        (dict(hidden=(1, 2, 3)), "at most two positive widths"),
        (dict(pool_after=(2, 1)), "in rising order"),
        (dict(pool_after=(5, 6)), "stages from 1 to 5"),
        (dict(dropout_rate=1.0), "dropout_rate is 1.0"),
    ],
)
def test_wrong_fields_are_refused_at_construction(fields, message):
    with pytest.raises(ValueError, match=message):
        VGG(**fields)


@pytest.mark.parametrize("image_shape", [(1, 32, 32, 1), (2, 33, 47, 4), (1, 64, 40, 3)], ids=str)
def test_images_may_have_any_size_and_channels(image_shape):
    model = VGG(11, num_classes=5, hidden=(8,), pool_size=2)
    logits = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], jnp.zeros(image_shape))
    assert logits.shape == (image_shape[0], 5)


def test_fewer_pools_accept_smaller_images():
    model = VGG(**SMALL, pool_after=(1, 2, 3))
    assert shapes(model, 1, 8, 8, 1)
    with pytest.raises(ValueError, match="H and W at least 8"):
        shapes(model, 1, 7, 8, 1)


def test_too_small_images_are_refused():
    with pytest.raises(ValueError, match="at least 32"):
        shapes(VGG(**SMALL), 1, 31, 64, 3)


def test_images_of_a_wrong_rank_or_dtype_are_refused(without_jaxtyping):
    with pytest.raises(ValueError, match=r"expected \(N, H, W, C\)"):
        shapes(VGG(**SMALL), 32, 32, 3)
    with pytest.raises(ValueError, match="images are uint8; expected floats; normalize them first"):
        VGG(**SMALL).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3), jnp.uint8))


def test_numpy_images_are_accepted_outside_of_jit(narrow):
    model = VGG(**SMALL)
    variables = random_variables(model, 32, 32, 3)
    images = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(model.apply(variables, images), model.apply(variables, jnp.asarray(images)))


def test_no_classes_gives_the_representation():
    model = VGG(11, num_classes=None, hidden=(16, 24))
    assert "fc8" not in shapes(model)["params"]
    output = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], jnp.zeros((2, 32, 32, 3)))
    assert output.shape == (2, 24)


def test_dropout_only_in_training(narrow):
    model = VGG(11, num_classes=4, hidden=(64, 64), pool_size=1)
    x = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    # The weights are larger than the initial ones, so that the difference is not rounding.
    variables = jax.tree.map(lambda a: 3 * a, random_variables(model, 32, 32, 3))
    train = jax.jit(lambda key: model.apply(variables, x, train=True, rngs={"dropout": key}))
    first, second = train(jax.random.key(2)), train(jax.random.key(3))
    assert relative_error(first, second) > 0.01
    np.testing.assert_array_equal(first, train(jax.random.key(2)))
    plain = model.clone(dropout_rate=0.0)
    expected = jax.jit(functools.partial(plain.apply, train=True))(variables, x)
    np.testing.assert_array_equal(jax.jit(model.apply)(variables, x), expected)


def test_bfloat16_computation_gives_float32_logits(narrow):
    model = VGG(**SMALL, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    variables = random_variables(model, 32, 32, 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    logits = jax.jit(model.apply)(variables, x)
    assert logits.dtype == jnp.float32
    error = relative_error(logits, jax.jit(model.clone(dtype=jnp.float32).apply)(variables, x))
    # bfloat16 has 8 bits, so each of nine roundings in a row contributes 0.4 %. The lower bound proves its use.
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("batch_norm", [False, True])
def test_remat_saves_residuals_and_keeps_gradients(batch_norm, x64, narrow):
    x = jax.random.normal(jax.random.key(1), (2, 32, 32, 3), jnp.float64)
    plain = VGG(**SMALL, batch_norm=batch_norm, dtype=jnp.float64, param_dtype=jnp.float64)
    variables = random_variables(plain, 32, 32, 3)
    gradients, residuals = [], []
    for model in (plain, plain.clone(remat=True)):

        def loss(params, model=model):
            logits, updates = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return (logits**2).sum(), updates

        gradients.append(jax.jit(jax.grad(loss, has_aux=True))(variables["params"]))
        vjp = jax.eval_shape(lambda p, loss=loss: jax.vjp(lambda p: loss(p)[0], p)[1], variables["params"])
        residuals.append(sum(leaf.size for leaf in jax.tree.leaves(vjp)))
    assert relative_error(*gradients) < 1e-12  # rounding, because XLA fuses differently
    assert residuals[1] < 0.7 * residuals[0]


def test_fast_and_plain_layers_are_the_same_function(x64, winograd, narrow):
    """Compare statistics, logits and the gradients of the parameters and of the images."""
    fast = VGG(**SMALL | dict(hidden=(1024,)), batch_norm=True, dtype=jnp.float64, param_dtype=jnp.float64)
    variables = random_variables(fast, 32, 32, 3)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, 32, 3)))
    results = []
    for model in (fast, fast.clone(layers=PLAIN)):

        def loss(params, x, model=model):
            logits, updates = model.apply(
                {**variables, "params": params},
                x,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )
            return (logits**2).sum(), (logits, updates)

        results.append(jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(variables["params"], x))
    for actual, expected in zip(*(jax.tree.leaves(result) for result in results), strict=True):
        # Batch norm over few pixels amplifies rounding. The gradients of biases before it are 0 up to rounding.
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("layers", [FAST, PLAIN], ids=["fast", "plain"])
def test_layers_have_a_forward_mode_derivative(layers, narrow):
    model = VGG(**SMALL, layers=layers)
    variables = random_variables(model, 32, 32, 3)
    images = jnp.ones((1, 32, 32, 3))
    _, tangent = jax.jvp(lambda images: model.apply(variables, images), (images,), (images,))
    assert np.abs(tangent).max() > 0


class Doubled(BatchNorm):
    """A batch norm whose output is doubled."""

    def __call__(self, x, use_running_average):
        return 2 * super().__call__(x, use_running_average)


def test_another_norm_can_be_injected(narrow):
    model = VGG(**SMALL, batch_norm=True)
    other = model.clone(layers=dataclasses.replace(FAST, norm=Doubled))
    variables = random_variables(model, 32, 32, 3)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    expected = 2 * jax.jit(functools.partial(model.apply, last_layer="bn1_1"))(variables, images)
    np.testing.assert_array_equal(
        jax.jit(functools.partial(other.apply, last_layer="bn1_1"))(variables, images), expected
    )


def test_network_is_a_static_argument_of_jit(narrow):
    """An equal network does not trace again; one with other layers does."""
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def logits(model, variables, images):
        traces.append(model)
        return model.apply(variables, images)

    variables, images = random_variables(VGG(**SMALL), 32, 32, 3), jnp.zeros((1, 32, 32, 3))
    for layers in (FAST, FAST, pickle.loads(pickle.dumps(FAST)), PLAIN):
        logits(VGG(**SMALL, layers=layers), variables, images)
    assert [model.layers for model in traces] == [FAST, PLAIN]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_remat_saves_four_fifths_of_vgg16_residuals(batch_norm):
    """Count what the backward pass of a batch of 32 at 224x224 needs from the forward pass, without parameters."""
    residuals = []
    for remat in (False, True):
        model = VGG(16, batch_norm=batch_norm, remat=remat)
        variables = shapes(model, 1, 224, 224, 3)

        def loss(params, variables=variables, model=model):
            images = jnp.zeros((32, 224, 224, 3))
            rngs = {"dropout": jax.random.key(0)}
            logits, _ = model.apply(
                {**variables, "params": params}, images, train=True, rngs=rngs, mutable=["batch_stats"]
            )
            return logits.sum()

        def residuals_of(variables, loss=loss):
            return jax.vjp(lambda params: loss(params, variables), variables["params"])[1]

        leaves = jax.tree.leaves(jax.eval_shape(residuals_of, variables))
        parameters = sum(leaf.size * 4 for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim > 1)
        residuals.append(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) - parameters)
    print(f"VGG-16, 224x224, batch 32: {residuals[0] / 2**30:.2f} GiB, with remat {residuals[1] / 2**30:.2f} GiB")
    assert residuals[1] < 0.2 * residuals[0]


def test_export_for_every_platform():
    model = VGG(**SMALL, batch_norm=True)
    x = jnp.zeros((8, 32, 32, 3))
    variables = shapes(model, *x.shape)
    exported = jax.export.export(jax.jit(model.apply), platforms=("cpu", "cuda", "tpu"))(variables, x)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert exported.out_avals[0].shape == (8, 10)


def test_light_imports():
    """The model and the training step need no library for data, and `import vgg_jax` imports none of the heavy ones."""
    heavy = "torch tensorflow tensorflow_datasets grain matplotlib sklearn orbax.checkpoint ml_collections tensorboardX"
    code = f"""
import sys
for name in {heavy.split()[2:]!r}:
    sys.modules[name] = None  # its import fails, as if it were not installed
import vgg_jax
from vgg_jax import VGG
from vgg_jax.training.state import create_train_state
from vgg_jax.training.step import eval_step, train_step
found = [name for name in {heavy.split()!r} if sys.modules.get(name)]
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True)
