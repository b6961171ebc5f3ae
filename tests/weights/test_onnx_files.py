"""ONNX files of PyTorch, TensorFlow and vgg_jax are read by their structure."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.conftest import raises_user_error, relative_error
from tests.weights.onnx_graphs import Builder, HandWritten, OldLRN, export, run, tf2onnx_shaped, torchvision_net
from tests.weights.test_folding import network
from tests.weights.test_layouts import assert_equal_trees
from vgg_jax import AUTHORS, CIFAR10, IMAGENET, Network, load
from vgg_jax.errors import UserError
from vgg_jax.export.onnx_file import write_onnx
from vgg_jax.export.onnx_options import OnnxOptions
from vgg_jax.model import PLAIN
from vgg_jax.weights.formats import Loaded, load_file

pytestmark = pytest.mark.usefixtures("narrow")


def images_of(*shape):
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def outputs_of(loaded, images):
    """Return the output of a network for images (N, H, W, C), after its softmax if the file has one."""
    return np.asarray(jax.jit(loaded.model.clone(layers=PLAIN).apply)(loaded.variables, images))


def check_logits(path, images, is_nchw=True, softmax=False):
    """Assert that a file gives what its own runtime computes from it; return what was loaded."""
    loaded = load_file(path)
    expected = run(path, images)
    actual = outputs_of(loaded, images.transpose(0, 2, 3, 1) if is_nchw else images)
    if softmax:
        assert loaded.outputs == "softmax"
        actual = np.asarray(jax.nn.softmax(actual))
    assert relative_error(actual, expected) < 1e-5
    return loaded


SHORT = [(11, False, True), (11, True, False)]
EXPORTS = list(itertools.product((11, 13, 16, 19), (False, True), (False, True)))


@pytest.mark.parametrize(
    ("depth", "batch_norm", "dynamo"),
    [pytest.param(*case, marks=() if case in SHORT else pytest.mark.slow) for case in EXPORTS],
)
def test_exports_of_torchvision_are_read(depth, batch_norm, dynamo, torchvision, tmp_path):
    """Both exporters fold the batch norm; the new one puts large arrays into a second file."""
    path = str(tmp_path / "net.onnx")
    net = torchvision_net(torchvision, depth, batch_norm)
    export(net, path, dynamo)
    images = images_of(2, 3, 224, 224)
    loaded = check_logits(path, images)
    with torch.no_grad():
        expected = net(torch.from_numpy(images)).numpy()
    assert relative_error(outputs_of(loaded, images.transpose(0, 2, 3, 1)), expected) < 1e-5
    assert (loaded.model.depth, loaded.model.pool_size, loaded.model.hidden) == (depth, 7, (16, 16))
    assert (loaded.model.num_classes, loaded.sides, loaded.preprocessing) == (10, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("size", [160, 256])
def test_adaptive_pool_of_many_nodes_is_read(size, torchvision, tmp_path):
    """PyTorch's new exporter writes a pool whose windows overlap as gathers, masks and sums."""
    path = export(torchvision_net(torchvision, 11, False), str(tmp_path / "net.onnx"), True, (size, size))
    loaded = check_logits(path, images_of(2, 3, size, size))
    assert (loaded.model.pool_size, loaded.sides) == (7, None)


@pytest.mark.slow
def test_batch_norm_is_kept_if_the_export_has_it(torchvision, tmp_path):
    path = str(tmp_path / "net.onnx")
    options = dict(training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False)
    export(torchvision_net(torchvision, 11, True), path, dynamo=False, **options)
    assert check_logits(path, images_of(1, 3, 224, 224)).model.batch_norm


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_hand_written_network_is_read(dynamo, tmp_path):
    path = export(HandWritten().eval(), str(tmp_path / "net.onnx"), dynamo, (64, 64))
    loaded = check_logits(path, images_of(2, 3, 64, 64), softmax=True)
    assert (loaded.model.depth, loaded.model.pool_size, loaded.model.hidden) == (11, 1, ())


PAPERS = 5 * 1e-4  # PyTorch divides the sum by the size


@pytest.mark.parametrize("lrn", ["torch", "old"])
@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch", ["any", *(pytest.param(how, marks=pytest.mark.slow) for how in ("fixed", "opset 9"))])
def test_local_response_norm_of_many_nodes_is_read(lrn, dynamo, batch, tmp_path):
    layer = torch.nn.LocalResponseNorm(5, PAPERS, 0.75, 2.0) if lrn == "torch" else OldLRN(PAPERS)
    options = {
        "any": {},
        "fixed": {"dynamic_shapes" if dynamo else "dynamic_axes": None},
        "opset 9": {} if dynamo else {"opset_version": 9},
    }
    path = export(HandWritten(layer).eval(), str(tmp_path / "net.onnx"), dynamo, (64, 64), **options[batch])
    loaded = check_logits(path, images_of(2, 3, 64, 64), softmax=True)
    assert (loaded.model.depth, loaded.model.lrn, loaded.model.batch_norm) == (11, True, False)


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (torch.nn.LocalResponseNorm(5), r"it has {'size': 5, 'alpha': 9.99.*e-05, 'beta': 0.75, 'bias': 1.0}"),
        (torch.nn.LocalResponseNorm(3, PAPERS, 0.75, 2.0), r"it has {'size': 3, .* expected the paper's constants"),
        (torch.nn.LocalResponseNorm(4, PAPERS, 0.75, 2.0), r"Div .* it takes the input of"),
    ],
    ids=["torch's defaults", "three channels", "four channels"],
)
def test_other_local_response_norm_is_refused(layer, found, tmp_path):
    path = export(HandWritten(layer).eval(), str(tmp_path / "net.onnx"), False, (64, 64))
    with pytest.raises(UserError, match=found):
        load_file(path)


TF2ONNX = [
    ("none", "flatten", "pads"), ("batch_norm", "average", "auto_pad"), ("folded", "flatten", "Pad"),
]  # fmt: skip


@pytest.mark.parametrize(("norm", "head", "padding"), TF2ONNX)
def test_graphs_in_the_shape_of_tf2onnx_are_read(norm, head, padding, tmp_path):
    """Transposed outside, dense layers as products and sums, probabilities at the end."""
    path = str(tmp_path / "net.onnx")
    onnx.save(tf2onnx_shaped(norm, head, padding), path)
    loaded = check_logits(path, images_of(2, 64, 64, 3), is_nchw=False, softmax=True)
    model = loaded.model
    assert (model.batch_norm, model.folded) == (norm == "batch_norm", norm == "folded")
    assert (model.pool_size, loaded.sides) == ((2, range(64, 96)) if head == "flatten" else (1, None))


def test_convolutional_part_ends_with_its_last_map(tmp_path):
    path = str(tmp_path / "net.onnx")
    onnx.save(tf2onnx_shaped("none", "none"), path)
    loaded = check_logits(path, images_of(1, 64, 64, 3), is_nchw=False)
    assert (loaded.model.final_layer, loaded.model.num_classes) == ("pool5", None)


OWN = {
    "batch norm": (dict(pool_size=7, hidden=(8, 8)), dict(size=(160, 160))),
    "A-LRN": (dict(batch_norm=False, lrn=True, pool_size=3), dict(size=(65, 97))),
    "C": (dict(batch_norm=False, depth=16, conv1x1=True), dict(dynamic_size=True, layout="NHWC")),
    "timm": (dict(pool_size=7, hidden=(8, 8), conv_head=True), dict(size=(160, 320))),
    "maxima": (dict(pool_size=3, head_pool="max"), dict(size=(65, 300))),
    "pool after fewer stages": (dict(pool_after=(1, 3)), dict(size=(32, 32), batch=2)),
    "representation": (dict(num_classes=None, hidden=(8, 8)), {}),
    "truncated": (dict(num_classes=None, hidden=(), final_layer="bn3_1"), dict(dynamic_size=True, layout="NHWC")),
    "flattened map": (dict(num_classes=None, hidden=(), pool_size=2), dict(size=(130, 128))),
    "pixels": ({}, dict(uint8=True, layout="NHWC", softmax=True)),
}


@pytest.mark.parametrize("case", OWN)
def test_own_files_return_bit_for_bit(case, tmp_path):
    """All fields of the network, preprocessing, class names and outputs return too."""
    fields, options = OWN[case]
    model, variables = network(**fields)
    model = model.clone(dropout_rate=0.25)
    names = None if model.num_classes is None else ("cat", "dog", "emu", "café", "10")
    given = Loaded(model, variables, dataclasses.replace(AUTHORS, resize=96, crop=64), names, "softmax")
    write_onnx(tmp_path / "net.onnx", given, OnnxOptions(**options))
    loaded = load_file(tmp_path / "net.onnx")
    assert loaded._replace(variables=None) == given._replace(variables=None)
    assert_equal_trees(loaded.variables, variables)


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (jnp.float16, jnp.float64))]
)
def test_own_files_keep_the_dtype(dtype, tmp_path, x64):
    model, variables = network(dtype)
    Network(model, variables, CIFAR10).save(tmp_path / "net.onnx")
    net = load(tmp_path / "net.onnx")
    assert net.model == model
    assert_equal_trees(net.variables, variables)


def test_folded_own_file_is_read_as_folded(tmp_path):
    model, variables = network()
    write_onnx(tmp_path / "net.onnx", Loaded(model, variables, CIFAR10), OnnxOptions(fold=True))
    loaded = load_file(tmp_path / "net.onnx")
    assert (loaded.model.folded, loaded.preprocessing, loaded.notes) == (True, CIFAR10, ())


def test_edited_own_file_is_read_off_its_graph(tmp_path):
    """Someone has replaced the last layer; the preprocessing still holds."""
    model, variables = network(batch_norm=False, hidden=())
    write_onnx(tmp_path / "net.onnx", Loaded(model, variables, CIFAR10, tuple("abcde")))
    graph = onnx.load(tmp_path / "net.onnx")
    for tensor in graph.graph.initializer:
        if tensor.name.startswith("fc8"):
            array = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array[:2].copy(), tensor.name))
    onnx.save(graph, tmp_path / "net.onnx")
    loaded = load_file(tmp_path / "net.onnx")
    assert (loaded.model.num_classes, loaded.classes, loaded.preprocessing) == (2, None, CIFAR10)
    assert "the network that vgg_jax described in the file is another one" in loaded.notes[-1]


def test_pixels_of_others_give_the_preprocessing(tmp_path):
    """A graph without our metadata that takes uint8 and normalizes."""
    model, variables = network(batch_norm=False)
    given = dataclasses.replace(AUTHORS, resize=64, crop=64)
    write_onnx(tmp_path / "net.onnx", Loaded(model, variables, given), OnnxOptions(uint8=True))
    graph = onnx.load(tmp_path / "net.onnx")
    del graph.metadata_props[:]
    onnx.save(graph, tmp_path / "net.onnx")
    found = load_file(tmp_path / "net.onnx").preprocessing
    assert (found.channel_order, found.resize, found.crop) == ("BGR", 64, 64)
    np.testing.assert_allclose((found.mean, found.std), (given.mean, given.std), rtol=1e-6)


def test_imagenet_network_of_torchvision_is_known(torchvision, tmp_path, monkeypatch):
    monkeypatch.setattr("vgg_jax.weights.imagenet_classes.HIDDEN", (16, 16))
    path = export(torchvision_net(torchvision, 11, False, 1000), str(tmp_path / "net.onnx"), dynamo=False)
    loaded = load_file(path)
    assert (loaded.preprocessing, len(loaded.classes)) == (IMAGENET, 1000)
    assert "taken for ImageNet's preprocessing and classes" in loaded.notes[-1]


def resnet(torchvision):
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4).eval()


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_resnet_is_refused_by_its_first_node(dynamo, torchvision, tmp_path):
    path = export(resnet(torchvision), str(tmp_path / "net.onnx"), dynamo)
    for features_only in (False, True):
        with raises_user_error(
            "net.onnx: its node", "Conv", "a kernel of 7x7 and strides [2, 2]; expected 3x3, stride 1"
        ):
            load_file(path, features_only)


def changed(**replacements):
    """Return VGG-11 in tf2onnx's shape in which the first node of a kind is replaced by a function of it."""
    model = tf2onnx_shaped("none", "average")
    for kind, change in replacements.items():
        change(next(node for node in model.graph.node if node.op_type == kind), model.graph)
    return model


def another_operation(node, graph):
    node.op_type = "LeakyRelu"


def second_branch(node, graph):
    graph.node.add(op_type="Relu", name="branch", input=[node.output[0]], output=["b"])
    graph.output.add(name="b")


def larger_stride(node, graph):
    node.attribute.append(onnx.helper.make_attribute("strides", [2, 2]))


def rounded_numbers(node, graph):
    node.op_type = "Cast"
    node.attribute.append(onnx.helper.make_attribute("to", onnx.TensorProto.INT32))


def rounded_up(node, graph):
    node.attribute.append(onnx.helper.make_attribute("ceil_mode", 1))
    graph.input[0].type.tensor_type.shape.dim[1].dim_value = 65


@pytest.mark.parametrize(
    ("replacements", "message"),
    [
        (dict(Relu=another_operation), "LeakyRelu 'StatefulPartitionedCall/vgg/Relu_2' does not fit a VGG"),
        (dict(MaxPool=second_branch), "Relu 'branch' does not fit a VGG: it takes the input of node 5, Conv"),
        (dict(Relu=rounded_numbers), "it casts to another type than floats"),
        (dict(Conv=larger_stride), "node 2, Conv 'StatefulPartitionedCall/vgg/Conv_1' does not fit a VGG"),
        (dict(MaxPool=rounded_up), "it rounds the size of its output up; expected down"),
    ],
)
def test_first_node_that_fits_no_vgg_is_named(replacements, message, tmp_path):
    onnx.save(changed(**replacements), tmp_path / "net.onnx")
    with raises_user_error("net.onnx: its node", message):
        load_file(tmp_path / "net.onnx")


def test_file_that_onnx_runtime_optimized_is_refused(tmp_path):
    onnx.save(tf2onnx_shaped("none", "average"), tmp_path / "net.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "fast.onnx"), 3
    onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), options, providers=["CPUExecutionProvider"])
    with raises_user_error("com.microsoft.FusedConv", "ONNX Runtime has fused its layers", "before optimization"):
        load_file(tmp_path / "fast.onnx")


def test_features_are_read_without_an_unknown_head(tmp_path):
    """The whole file is refused, and the message names the remedy."""
    model = tf2onnx_shaped("none", "average")
    node = next(node for node in model.graph.node if node.op_type == "ReduceMean")
    node.op_type = "ReduceL2"
    onnx.save(model, tmp_path / "net.onnx")
    with raises_user_error("ReduceL2", "--features-only"):
        load_file(tmp_path / "net.onnx")
    net = load(tmp_path / "net.onnx", features_only=True)
    assert (net.model.depth, net.model.num_classes, net.model.hidden) == (11, None, ())
    notes = load_file(tmp_path / "net.onnx", features_only=True).notes
    assert "the head is left out, from node" in notes[0]


def test_file_beside_the_graph_is_checked(tmp_path):
    path, data = str(tmp_path / "net.onnx"), tmp_path / "net.onnx.data"
    beside = dict(save_as_external_data=True, location=data.name, size_threshold=0, convert_attribute=False)
    onnx.save(tf2onnx_shaped("batch_norm", "average"), path, **beside)
    check_logits(path, images_of(1, 64, 64, 3), is_nchw=False, softmax=True)
    content = data.read_bytes()
    data.write_bytes(content[:-8])
    with raises_user_error("net.onnx: net.onnx.data has", "copy the file that belongs to the graph"):
        load_file(path)
    data.unlink()
    with raises_user_error("net.onnx: net.onnx.data is missing", "put it into the folder of the graph"):
        load_file(path)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "link"])
def test_files_outside_the_folder_are_refused(location, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(10**6))
    (folder / "link").symlink_to(tmp_path / "secret")
    model = tf2onnx_shaped("none", "none")
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    with raises_user_error("expected a file in the folder of the graph"):
        load_file(folder / "net.onnx")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "net.onnx"
    content = tf2onnx_shaped("none", "none").SerializeToString()
    path.write_bytes(content[: len(content) // 2])
    with raises_user_error("net.onnx: not a whole ONNX file"):
        load_file(path)
    model = tf2onnx_shaped("none", "none")
    model.graph.initializer[0].dims[0] = 2**40
    path.write_bytes(model.SerializeToString())
    with raises_user_error("net.onnx: the tensor 'const_0' has 864 bytes; expected"):
        load_file(path)
    circle = Builder()
    circle.nodes.append(onnx.helper.make_node("Identity", ["a"], ["a"]))
    model = tf2onnx_shaped("none", "none")
    model.graph.node[1].input[1] = model.graph.node[1].output[0]
    path.write_bytes(model.SerializeToString())
    with raises_user_error("net.onnx: its node 2, Conv"):
        load_file(path)


def test_missing_package_is_named(tmp_path, monkeypatch):
    onnx.save(tf2onnx_shaped("none", "none"), tmp_path / "net.onnx")
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with raises_user_error("pip install 'vgg_jax[export]'"):
        load_file(tmp_path / "net.onnx")
    with raises_user_error("pip install 'vgg_jax[export]'"):
        write_onnx(tmp_path / "other.onnx", Loaded(*network()))


def test_suffix_does_not_matter(tmp_path):
    model, variables = network()
    Network(model, variables, CIFAR10).save(tmp_path / "net.onnx")
    (tmp_path / "net.onnx").rename(tmp_path / "net.bin")
    assert load(tmp_path / "net.bin").model == model
