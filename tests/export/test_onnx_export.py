"""ONNX files that we write: ONNX Runtime computes what the network computes."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

from tests.conftest import photographs, raises_user_error, relative_error
from tests.weights.test_folding import network
from vgg_jax import AUTHORS, CIFAR10, IMAGENET, VGG, Network
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.export.onnx_file import write_onnx
from vgg_jax.export.onnx_int8 import graph_input
from vgg_jax.export.onnx_options import OnnxOptions
from vgg_jax.model import PLAIN
from vgg_jax.weights.formats import Loaded

COLUMNS = {
    **{f"{depth}{'-BN' * bn}": dict(depth=depth, batch_norm=bn) for depth in (11, 13, 16, 19) for bn in (False, True)},
    "A-LRN": dict(depth=11, batch_norm=False, lrn=True),
    "C": dict(depth=16, batch_norm=False, conv1x1=True),
}
HEADS = {
    "torchvision": dict(pool_size=7, hidden=(16, 16), num_classes=10),
    "CIFAR": dict(pool_size=1, hidden=(), num_classes=10),
    "timm": dict(pool_size=7, hidden=(16, 16), num_classes=10, conv_head=True),
}
SIZES = ((224, 224), (160, 160), (65, 97))


def images_of(height, width, count=7, channels=3):
    return np.random.default_rng(2).normal(size=(count, height, width, channels)).astype(np.float32)


@functools.cache
def program(model):
    return jax.jit(model.clone(layers=PLAIN).apply)


def run(content, images):
    """Return what ONNX Runtime computes from a file or its content."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def check(path, model, variables, size):
    """Compare folded and unfolded files with the network, for one image and for seven."""
    images = images_of(*size)
    expected = np.asarray(program(model)(variables, images))
    for fold in (False, True):
        write_onnx(path, Loaded(model, variables), OnnxOptions(size=size, fold=fold))
        onnx.checker.check_model(path, full_check=True)
        kinds = {node.op_type for node in onnx.load(path).graph.node}
        assert ("BatchNormalization" in kinds) == (model.batch_norm and not fold)
        for count in (1, 7):
            actual = run(path, np.ascontiguousarray(images[:count].transpose(0, 3, 1, 2)))
            assert relative_error(actual, expected[:count]) < 1e-5, (size, fold, count)


# Each column once in every run, with another head and size.
SHORT = [(column, list(HEADS)[i % 3], 1 if column == "C" else 2) for i, column in enumerate(COLUMNS)]
ALL = [(column, head, size) for column in COLUMNS for head in HEADS for size in range(3)]


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("column", "head", "size"),
    [pytest.param(*case, marks=() if case in SHORT else pytest.mark.slow) for case in ALL],
)
def test_onnx_runtime_computes_the_same_logits(column, head, size, tmp_path):
    model, variables = network(**COLUMNS[column], **HEADS[head])
    check(str(tmp_path / "net.onnx"), model, variables, SIZES[size])


@pytest.mark.slow
@pytest.mark.parametrize("column", COLUMNS)
def test_full_networks_give_the_same_logits(column, tmp_path):
    """The paper's widths and the head of 4096 units."""
    model, variables = network(**COLUMNS[column], pool_size=7, hidden=(4096, 4096), num_classes=1000)
    for size in SIZES:
        check(str(tmp_path / "net.onnx"), model, variables, size)


@pytest.mark.usefixtures("narrow")
def test_file_states_all_that_the_network_carries(tmp_path):
    model, variables = network(batch_norm=False)
    names = ("cat", "dog", "emu", "café", "10")
    Network(model, variables, CIFAR10, names, "sigmoid").save(tmp_path / "net.onnx")
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert json.loads(metadata["classes"]) == list(names)
    assert json.loads(metadata["preprocessing"])["mean"] == list(CIFAR10.mean)
    assert metadata["outputs"] == "sigmoid"


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("preprocessing", "channels", "layout"),
    [(IMAGENET, 3, "NHWC"), (AUTHORS, 3, "NCHW"), (Preprocessing(40, 32, (0.5,), (0.2,), "L"), 1, "NCHW")],
)
def test_pixels_are_normalized_inside(preprocessing, channels, layout, tmp_path):
    """A photograph as uint8 gives the logits of the preprocessed photograph; the graph takes RGB or gray."""
    model = VGG(11, num_classes=5, pool_size=1, hidden=())
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, channels)))
    draw = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), shapes)
    options = OnnxOptions(layout, uint8=True, softmax=False)
    write_onnx(tmp_path / "net.onnx", Loaded(model, variables, preprocessing), options)
    image = photographs(1)[0]
    pixels = graph_input(image, preprocessing, options)
    assert pixels.dtype == np.uint8
    expected = program(model)(variables, preprocessing(image)[None])
    assert relative_error(run(tmp_path / "net.onnx", pixels[None]), expected) < 1e-5


@pytest.mark.usefixtures("narrow")
def test_dynamic_size_takes_images_of_any_size(tmp_path):
    model, variables = network(head_pool="max")
    path = str(tmp_path / "net.onnx")
    write_onnx(path, Loaded(model, variables), OnnxOptions("NHWC", dynamic_size=True, softmax=True))
    for size in ((32, 32), (65, 97)):
        images = images_of(*size, count=2)
        expected = jax.nn.softmax(program(model)(variables, images))
        assert relative_error(run(path, images), expected) < 1e-5


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("fields", "size"),
    [
        (dict(head_pool="max", pool_size=3), (65, 230)),
        (dict(num_classes=None, hidden=(), pool_size=2), (96, 65)),
        (dict(num_classes=None, hidden=(), final_layer="relu2_1"), (33, 40)),
    ],
    ids=["maxima of overlapping windows", "flattened map", "map"],
)
def test_other_heads_give_the_same_output(fields, size, tmp_path):
    model, variables = network(batch_norm=False, **fields)
    images = images_of(*size, count=2)
    write_onnx(tmp_path / "net.onnx", Loaded(model, variables), OnnxOptions("NHWC", size=size))
    expected = program(model)(variables, images)
    actual = run(tmp_path / "net.onnx", images)
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.usefixtures("narrow")
def test_half_precision_weights_keep_their_dtype(tmp_path):
    sizes = {}
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        model, variables = network(dtype, batch_norm=False)
        write_onnx(tmp_path / "net.onnx", Loaded(model, variables), OnnxOptions(size=(32, 32)))
        images = images_of(32, 32, count=1)
        expected = program(model.clone(dtype=jnp.float32))(variables, images)
        assert relative_error(run(tmp_path / "net.onnx", images.transpose(0, 3, 1, 2)), expected) < 1e-5
        sizes[dtype] = (tmp_path / "net.onnx").stat().st_size
    assert sizes[jnp.bfloat16] < 0.55 * sizes[jnp.float32]


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, dict(layout="NWHC"), "the layout is 'NWHC'; expected NCHW or NHWC"),
        ({}, dict(batch=0), "the batch is 0; expected 1 or more"),
        ({}, dict(size=(31, 40)), "the size is 31x40; expected at least 32x32, which the max pools need"),
        ({}, dict(size=(40, 40), dynamic_size=True), "found a size and a dynamic size; expected one"),
        (dict(pool_size=7), dict(dynamic_size=True), "a dynamic size needs pool_size 1; found 7"),
        ({}, dict(uint8=True), "uint8 images need the preprocessing, which the network does not state"),
        (dict(num_classes=None), dict(softmax=True), "a softmax needs classes"),
    ],
)
def test_wrong_options_are_refused_before_writing(fields, options, message, tmp_path):
    model, variables = network(batch_norm=False, **fields)
    with raises_user_error(message):
        write_onnx(tmp_path / "net.onnx", Loaded(model, variables), OnnxOptions(**options))
    with raises_user_error("missing, the folder of net.onnx, does not exist"):
        write_onnx(tmp_path / "missing" / "net.onnx", Loaded(model, variables))
    assert not list(tmp_path.iterdir())
