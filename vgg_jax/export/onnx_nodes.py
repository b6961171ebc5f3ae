"""A growing ONNX graph, and the pools that ONNX has no operation for."""

from collections.abc import Callable
from typing import Any

import numpy as np

from vgg_jax.errors import require
from vgg_jax.ops.pool_windows import averaging_matrix, window_rows

OPSET, IR_VERSION = 17, 8  # of 2022: old enough for every runtime in use


class Graph:
    """The nodes and constants of a graph, in order."""

    def __init__(self) -> None:
        self.helper = require("onnx.helper", "export")
        self.float32 = require("onnx", "export").TensorProto.FLOAT
        self._to_tensor: Callable[..., Any] = require("onnx.numpy_helper", "export").from_array
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, kind: str, *inputs: str, name: str, **attributes: Any) -> str:
        """Add a node with one output; return the output, which has the node's name."""
        self.nodes.append(self.helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, array: np.ndarray) -> str:
        """Add a constant as it is; return its name."""
        self.constants.append(self._to_tensor(np.asarray(array, order="C"), name))
        return name

    def weight(self, name: str, array: np.ndarray) -> str:
        """Add a constant in its own dtype; return its name, or that of a cast to float32 if it has another dtype."""
        constant = self.constant(name, array)
        if array.dtype == np.float32:
            return constant
        return self.add("Cast", constant, name=f"{name}.float32", to=self.float32)


def pool_to(
    graph: Graph, x: str, size: tuple[int, int] | None, target: tuple[int, int], kind: str, name: str = "pool_head"
) -> str:
    """Add the adaptive pool of maps (N, C, H, W) to the graph; return its output.

    Args:
      graph: the graph.
      x: the maps.
      size: their height and width; None if these are dynamic, which needs the target (1, 1).
      target: height and width of the pool.
      kind: average or max.
      name: the name of the last node.
    """
    operation = {"average": "AveragePool", "max": "MaxPool"}[kind]
    if size == target:
        return x
    if size is None or target == (1, 1):
        return graph.add(f"Global{operation}", x, name=name)
    if all(side % out == 0 for side, out in zip(size, target, strict=True)):
        window = [side // out for side, out in zip(size, target, strict=True)]
        return graph.add(operation, x, name=name, kernel_shape=window, strides=window)
    if kind == "max":
        return _max_of_windows(graph, x, size, target, name)
    rows, columns = (averaging_matrix(*pair) for pair in zip(size, target, strict=True))
    x = graph.add("MatMul", x, graph.constant(f"{name}.columns", columns.T), name=f"{name}_columns")
    return graph.add("MatMul", graph.constant(f"{name}.rows", rows), x, name=name)


def _max_of_windows(graph: Graph, x: str, size: tuple[int, int], target: tuple[int, int], name: str) -> str:
    """Add a max pool whose windows overlap: their rows and columns are gathered, and a plain max pool follows."""
    lengths = []
    for axis, part, side, out in zip((2, 3), ("rows", "columns"), size, target, strict=True):
        rows, length = window_rows(side, out)
        x = graph.add("Gather", x, graph.constant(f"{name}.{part}", rows), name=f"{name}_{part}", axis=axis)
        lengths.append(length)
    return graph.add("MaxPool", x, name=name, kernel_shape=lengths, strides=lengths)
