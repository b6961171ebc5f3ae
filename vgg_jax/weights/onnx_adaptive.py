"""Adaptive pools that PyTorch's exporter writes as many nodes: recognized by what they compute."""

import math
from typing import Any

import numpy as np

from vgg_jax.errors import require
from vgg_jax.ops.pool_windows import averaging_matrix
from vgg_jax.weights.onnx_files import Node
from vgg_jax.weights.onnx_walk import Walk

OPERATIONS = ("Transpose", "GatherND", "Gather", "Where", "Add", "Div", "Mul", "Unsqueeze", "Squeeze", "ReduceMean")
LAST = ("Div", "ReduceMean")
LARGEST_SIDE, LARGEST_TARGET = 64, 16  # of maps whose pool is computed
MOST_NODES, MOST_NUMBERS = 64, 10**7  # numbers of one tensor
OPSET = 18


def adaptive_pool(walk: Walk, tensor: str) -> tuple[Node, str, int] | None:
    """Return the last node of an adaptive average pool of many nodes, its output, and the side of that.

    The nodes are computed for random maps, and the result is compared with that of the pool.

    Args:
      walk: the walk, which knows the size of the maps.
      tensor: the maps (N, C, H, W).

    Returns:
      None if no such nodes follow, or they compute something else.
    """
    height, width = walk.side("H"), walk.side("W")
    if height is None or width is None or max(height, width) > LARGEST_SIDE:
        return None
    nodes = _until_one_tensor(walk, tensor)
    if not nodes:
        return None
    last = nodes[-1]
    maps = np.random.default_rng(0).standard_normal((2, walk.side("C") or 1, height, width)).astype(np.float32)
    pooled = _computed(walk, nodes, tensor, maps)
    if pooled is None or pooled.ndim != 4 or pooled.shape[:2] != maps.shape[:2]:
        return None
    target = pooled.shape[2]
    if pooled.shape[3] != target or not 0 < target <= LARGEST_TARGET:
        return None
    rows, columns = (averaging_matrix(side, target) for side in maps.shape[2:])
    expected = rows @ maps @ columns.T
    return (last, last.outputs[0], target) if np.allclose(pooled, expected, atol=1e-4) else None


def _until_one_tensor(walk: Walk, tensor: str) -> list[Node]:
    """Return the nodes from a tensor up to the one through which all that follows passes; none if there are none."""
    uses: dict[str, int] = {}
    for node in walk.file.nodes:
        for name in node.inputs:
            uses[name] = uses.get(name, 0) + 1
    live, taken = {tensor: uses.get(tensor, 0)}, list[Node]()
    for node in walk.file.nodes:
        derived = [name for name in node.inputs if name in live]
        if not derived:
            continue
        if node.kind not in OPERATIONS or len(node.outputs) != 1 or len(taken) == MOST_NODES:
            return []
        taken.append(node)
        for name in derived:
            live[name] -= 1
        live = {name: count for name, count in live.items() if count > 0}
        if not live and len(taken) > 2 and node.kind in LAST:
            return taken
        live[node.outputs[0]] = uses.get(node.outputs[0], 0)
    return []


def _computed(walk: Walk, nodes: list[Node], tensor: str, maps: np.ndarray) -> np.ndarray | None:
    """Return what the nodes compute of maps; None if they do not compute, or take large constants."""
    onnx = require("onnx", "export")
    made = {tensor, *(node.outputs[0] for node in nodes)}
    names = dict.fromkeys(name for node in nodes for name in node.inputs if name and name not in made)
    arrays = {name: walk.values.array(name) for name in names}
    if any(array is None or array.size > MOST_NUMBERS for array in arrays.values()):
        return None
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    result = nodes[-1].outputs[0]
    graph = helper.make_graph(
        [helper.make_node(n.kind, n.inputs, n.outputs, name=n.name, **n.attributes) for n in nodes],
        "pool",
        [helper.make_tensor_value_info(tensor, kind, list(maps.shape))],
        [helper.make_tensor_value_info(result, kind, None)],
        [onnx.numpy_helper.from_array(np.asarray(array, order="C"), name) for name, array in arrays.items()],
    )
    reference: Any = require("onnx.reference", "export")
    try:
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
        if not _is_small(onnx.shape_inference.infer_shapes(model, strict_mode=True).graph, len(nodes)):
            return None
        computed = reference.ReferenceEvaluator(model).run(None, {tensor: maps})[0]
    except Exception:  # of many kinds: the nodes are of a stranger
        return None
    return np.asarray(computed)


def _is_small(graph: Any, nodes: int) -> bool:
    """Return whether the shapes of all tensors that the nodes compute are known and not too large."""
    values = [*graph.value_info, *graph.output]
    sizes = [math.prod(side.dim_value for side in value.type.tensor_type.shape.dim) for value in values]
    is_known = all(value.type.tensor_type.HasField("shape") for value in values)
    return is_known and len(values) >= nodes and all(0 < size <= MOST_NUMBERS for size in sizes)
