"""A VGG as an ONNX graph, node by node under the paper's names."""

import itertools
from typing import Any

import numpy as np

from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.export.onnx_nodes import IR_VERSION, OPSET, Graph, pool_to
from vgg_jax.export.onnx_options import OnnxOptions
from vgg_jax.model import VGG, Layer
from vgg_jax.weights.folding import batch_norm_epsilon, fold_batch_norm
from vgg_jax.weights.formats import Loaded, own_metadata
from vgg_jax.weights.layouts import table

INPUT = "images"
# ONNX divides the sum of squares by the size; the paper does not.
LRN: dict[str, Any] = dict(size=5, alpha=5 * 1e-4, beta=0.75, bias=2.0)

Size = tuple[int, int] | None  # height and width; None: dynamic


def onnx_model(network: Loaded, options: OnnxOptions) -> Any:
    """Return a network as an onnx.ModelProto, with all that it carries in the metadata.

    The graph computes in float32. The weights keep their dtype, and a cast follows them if it is another one.

    Args:
      network: the network.
      options: the choices of the file.

    Raises:
      UserError: if onnx is not installed, or an option is not valid or does not fit the network.
    """
    size = options.checked_size(network)
    if options.fold:
        model, variables = fold_batch_norm(network.model, network.variables)
        network = network._replace(model=model, variables=variables)
    graph = Graph()
    channels = network.variables["params"]["conv1_1"]["kernel"].shape[2]
    x = _input(graph, options, network.preprocessing)
    weights = _add_weights(graph, network, channels)
    x, size = _add_stages(graph, network.model, weights, x, size)
    if network.model.final_layer is None:
        x = _add_head(graph, network.model, weights, x, size)
    return _model(graph, network, options, channels, _end(graph, network, options, x))


def _input(graph: Graph, options: OnnxOptions, preprocessing: Preprocessing | None) -> str:
    """Add what brings the input to normalized images (N, C, H, W); return these."""
    x = INPUT
    if options.uint8:
        x = graph.add("Cast", x, name="pixels", to=graph.float32)
    if options.layout == "NHWC":
        x = graph.add("Transpose", x, name="images_nchw", perm=[0, 3, 1, 2])
    if options.uint8 and preprocessing is not None:
        if preprocessing.channel_order == "BGR":
            x = graph.add("Gather", x, graph.constant("bgr", np.array([2, 1, 0])), name="pixels_bgr", axis=1)
        mean, std = (np.array(a, np.float32).reshape(1, -1, 1, 1) for a in (preprocessing.mean, preprocessing.std))
        x = graph.add("Div", x, graph.constant("white", np.array(255, np.float32)), name="scaled")
        x = graph.add("Sub", x, graph.constant("mean", mean), name="centered")
        x = graph.add("Div", x, graph.constant("std", std), name="normalized")
    return x


def _add_weights(graph: Graph, network: Loaded, channels: int) -> dict[str, list[str]]:
    """Add the weights in PyTorch's layout; return their names in the graph by layer, in the order of ONNX."""
    weights: dict[str, list[str]] = {}
    for entry in table(network.model, channels):
        collection, layer, leaf = entry.path
        array = np.asarray(network.variables[collection][layer][leaf])
        array = entry.layout.to_torch(array).reshape(entry.shape)
        if network.model.conv_head and layer in ("fc6", "fc7") and leaf == "kernel":
            side = network.model.pool_size if layer == "fc6" else 1
            array = array.reshape(len(array), -1, side, side)
        weights.setdefault(layer, []).append(graph.weight(f"{layer}.{leaf}", array))
    return weights


def _add_stages(graph: Graph, model: VGG, weights: dict[str, list[str]], x: str, size: Size) -> tuple[str, Size]:
    """Add the convolutional part; return its last map and the map's height and width."""
    for layer in itertools.chain(*model.stages):
        match layer.kind:
            case "conv":
                side = layer.kernel_size
                padding = [side // 2] * 4
                x = graph.add("Conv", x, *weights[layer.name], name=layer.name, kernel_shape=[side, side], pads=padding)
            case "bn":
                epsilon = batch_norm_epsilon(model)
                x = graph.add("BatchNormalization", x, *weights[layer.name], name=layer.name, epsilon=epsilon)
            case "relu":
                x = graph.add("Relu", x, name=layer.name)
            case "lrn":
                x = graph.add("LRN", x, name=layer.name, **LRN)
            case "pool":
                x = graph.add("MaxPool", x, name=layer.name, kernel_shape=[2, 2], strides=[2, 2])
                size = size and (size[0] // 2, size[1] // 2)
    return x, size


def _add_head(graph: Graph, model: VGG, weights: dict[str, list[str]], x: str, size: Size) -> str:
    """Add the pool and the dense layers; return the output (N, D)."""
    side = model.pool_size
    if not model.conv_head:
        x = pool_to(graph, x, size, (side, side), model.head_pool)
        if not weights.keys() & set(model.head_layers):
            x = graph.add("Transpose", x, name="pool_nhwc", perm=[0, 2, 3, 1])  # our order of a flattened map
        x = graph.add("Flatten", x, name="flat")
    elif size is not None:
        x = pool_to(graph, x, size, (max(size[0], side), max(size[1], side)), "average")
    is_map = model.conv_head
    for layer in model.head:
        match layer.kind:
            case "dense":
                x = _add_dense(graph, layer, weights[layer.name], x, is_map)
            case "relu":
                x = graph.add("Relu", x, name=layer.name)
            case "average":
                x = graph.add("GlobalAveragePool", x, name=layer.name)
                x, is_map = graph.add("Flatten", x, name="flat"), False
    return x


def _add_dense(graph: Graph, layer: Layer, weights: list[str], x: str, is_map: bool) -> str:
    if is_map:
        return graph.add("Conv", x, *weights, name=layer.name, kernel_shape=[layer.kernel_size] * 2)
    return graph.add("Gemm", x, *weights, name=layer.name, transB=1)


def _end(graph: Graph, network: Loaded, options: OnnxOptions, x: str) -> str:
    """Name the output, after the softmax or the transposition that the options ask for; return its name."""
    model = network.model
    if options.softmax:
        if network.outputs == "sigmoid":
            return graph.add("Sigmoid", x, name="probabilities")
        return graph.add("Softmax", x, name="probabilities", axis=1)
    if model.final_layer is not None and options.layout == "NHWC":
        return graph.add("Transpose", x, name="features", perm=[0, 2, 3, 1])
    name = "features" if model.num_classes is None else "values" if network.outputs == "values" else "logits"
    graph.nodes[-1].output[0] = name
    return name


def _model(graph: Graph, network: Loaded, options: OnnxOptions, channels: int, output: str) -> Any:
    """Return the complete model of a graph."""
    helper, batch = graph.helper, "N" if options.batch is None else options.batch
    size = options.checked_size(network)
    sides: list[Any] = ["height", "width"] if size is None else list(size)
    shape = [batch, channels, *sides] if options.layout == "NCHW" else [batch, *sides, channels]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(np.uint8 if options.uint8 else np.float32))
    images = helper.make_tensor_value_info(INPUT, kind, shape)
    result = helper.make_tensor_value_info(output, graph.float32, _output_shape(network.model, batch, options))
    model = helper.make_model(
        helper.make_graph(graph.nodes, f"vgg{network.model.depth}", [images], [result], graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="vgg_jax",
    )
    helper.set_model_props(model, own_metadata(network))
    return model


def _output_shape(model: VGG, batch: int | str, options: OnnxOptions) -> list[Any]:
    width = list(model.layer_geometry.values())[-1].channels
    if model.final_layer is not None:
        return [batch, width, None, None] if options.layout == "NCHW" else [batch, None, None, width]
    return [batch, width if model.head else width * model.pool_size**2]
