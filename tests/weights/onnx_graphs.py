"""ONNX files of others, for the tests: by PyTorch's exporters, and by hand in the shape of tf2onnx."""

import contextlib
import io
import itertools
import logging
import warnings

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.nn import functional

from tests.narrow import NARROW_TABLE

COLUMNS = {11: "A", 13: "B", 16: "D", 19: "E"}


def torchvision_net(torchvision, depth, batch_norm, classes=10):
    """Return a narrow network of torchvision's class with random statistics."""
    torch.manual_seed(0)
    widths = [part for stage in NARROW_TABLE[COLUMNS[depth]] for part in (*stage, "M")]
    net = torchvision.models.VGG(torchvision.models.vgg.make_layers(widths, batch_norm), init_weights=False)
    channels = NARROW_TABLE[COLUMNS[depth]][-1][-1]
    dense = [nn.Linear(channels * 49, 16), nn.Linear(16, 16), nn.Linear(16, classes)]
    net.classifier = nn.Sequential(dense[0], nn.ReLU(), nn.Dropout(), dense[1], nn.ReLU(), nn.Dropout(), dense[2])
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.1, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    return net.eval()


class HandWritten(nn.Module):
    """VGG-11 as people write it: functions instead of modules, names of their own, a view, and probabilities.

    `lrn` takes the place of batch norm: a module after the first ReLU.
    """

    def __init__(self, lrn=None):
        super().__init__()
        torch.manual_seed(1)
        widths = [3, *(width for stage in NARROW_TABLE["A"] for width in stage)]
        self.blocks = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.Identity() if lrn else nn.BatchNorm2d(width, eps=1e-3) for width in widths[1:])
        self.lrn = lrn or nn.Identity()
        self.out = nn.Linear(widths[-1], 4)

    def forward(self, x):
        for i, (conv, norm) in enumerate(zip(self.blocks, self.norms, strict=True)):
            x = functional.relu(norm(conv(x)))
            x = self.lrn(x) if i == 0 else x
            if i in (0, 1, 3, 5, 7):
                x = functional.max_pool2d(x, 2, 2)
        x = functional.adaptive_avg_pool2d(x, 1)
        return self.out(functional.dropout(x.view(x.size(0), -1), training=self.training)).softmax(1)


class OldLRN(nn.Module):
    """Local response normalization as it was written before PyTorch had it."""

    def __init__(self, alpha):
        super().__init__()
        self.average = nn.AvgPool3d((5, 1, 1), stride=1, padding=(2, 0, 0))
        self.alpha = alpha

    def forward(self, x):
        mean = self.average(x.pow(2).unsqueeze(1)).squeeze(1)
        return x.div(mean.mul(self.alpha).add(2.0).pow(0.75))


def export(net, path, dynamo, size=(224, 224), **options):
    """Export a network by PyTorch's new exporter (dynamo) or its old one, for any number of images."""
    shape = {"dynamic_shapes": ({0: torch.export.Dim("n")},)} if dynamo else {"dynamic_axes": {"x": {0: "n"}}}
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # PyTorch's own
            args = (torch.zeros(2, 3, *size),)
            torch.onnx.export(net, args, path, dynamo=dynamo, input_names=["x"], verbose=False, **(shape | options))
    finally:
        logging.disable(logging.NOTSET)
    return path


def run(path, images):
    """Return the first output that ONNX Runtime computes."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


class Builder:
    """A graph in the shape of tf2onnx: NHWC outside, transpositions around NCHW, MatMul and Add in dense layers."""

    def __init__(self, seed=0):
        self.nodes, self.constants = [], []
        self.random = np.random.default_rng(seed)

    def add(self, kind, *inputs, **attributes):
        name = f"StatefulPartitionedCall/vgg/{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}:0"], name=name, **attributes))
        return f"{name}:0"

    def constant(self, array):
        name = f"const_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def draw(self, *shape, scale=1.0):
        return self.constant((scale * self.random.standard_normal(shape)).astype(np.float32))

    def model(self, output, rank=2, shape=("n", 64, 64, 3)):
        graph = helper.make_graph(
            self.nodes,
            "tf2onnx",
            [helper.make_tensor_value_info("input_1", onnx.TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, [None] * rank)],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return model


def tf2onnx_shaped(norm, head, padding="pads"):
    """Return VGG-11 in tf2onnx's shape.

    Args:
      norm: "batch_norm" (a node), "folded" (a product and a sum) or "none".
      head: "flatten" (a map of 2x2), "average" (ReduceMean) or "none".
      padding: "pads", "auto_pad" or "Pad" (a node).
    """
    b = Builder()
    x, channels = b.add("Transpose", "input_1", perm=[0, 3, 1, 2]), 3
    for widths in NARROW_TABLE["A"]:
        for width in widths:
            kernel = b.draw(width, channels, 3, 3, scale=np.sqrt(2 / (9 * channels)))
            options = {"pads": {"pads": [1] * 4}, "auto_pad": {"auto_pad": "SAME_UPPER"}, "Pad": {}}[padding]
            if padding == "Pad":
                x = b.add("Pad", x, b.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1])))
            bias = [] if norm == "folded" else [b.draw(width, scale=0.1)]
            x = b.add("Conv", x, kernel, *bias, kernel_shape=[3, 3], **options)
            if norm == "batch_norm":
                positive = [b.constant(b.random.uniform(0.5, 1.5, width).astype(np.float32)) for _ in range(2)]
                arrays = positive[0], b.draw(width, scale=0.1), b.draw(width, scale=0.1), positive[1]
                x = b.add("BatchNormalization", x, *arrays, epsilon=1e-3)
            elif norm == "folded":
                x = b.add("Mul", x, b.constant(b.random.uniform(0.5, 1.5, (1, width, 1, 1)).astype(np.float32)))
                x = b.add("Add", x, b.draw(1, width, 1, 1, scale=0.1))
            x, channels = b.add("Relu", x), width
        x = b.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], auto_pad="VALID")
    x = b.add("Transpose", x, perm=[0, 2, 3, 1])
    if head == "none":
        return b.model(b.add("Identity", x), rank=4)
    if head == "flatten":
        x, channels = b.add("Reshape", x, b.constant(np.array([-1, 4 * channels]))), 4 * channels
    else:
        x = b.add("ReduceMean", x, axes=[1, 2], keepdims=0)
    x = b.add("Relu", b.add("Add", b.add("MatMul", x, b.draw(channels, 16, scale=0.1)), b.draw(16)))
    return b.model(b.add("Softmax", b.add("Add", b.add("MatMul", x, b.draw(16, 5, scale=0.02)), b.draw(5)), axis=-1))
