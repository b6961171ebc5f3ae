"""Local response normalization in an ONNX graph: one node, or the many that PyTorch's exporters write."""

import math
from typing import Any

import numpy as np

from vgg_jax.weights.onnx_files import Node
from vgg_jax.weights.onnx_values import Shape
from vgg_jax.weights.onnx_walk import AXES, Found, Walk

LRN = {"size": 5, "alpha": 5e-4, "beta": 0.75, "bias": 2.0}  # the paper's; ONNX divides the sum by the size
DEFAULTS = {"alpha": 1e-4, "beta": 0.75, "bias": 1.0}
MOST_RESHAPES, MOST_PADS = 8, 4  # after the pool, and before it
STAND_INS = (7919, 7907, 7901, 7883)  # primes for unknown sides, so that a computed shape shows which side it holds


def lrn(walk: Walk, node: Node) -> None:
    """Follow one node with the paper's constants."""
    walk.name_axes()
    found: dict[str, Any] = {name: node.attributes.get(name, DEFAULTS.get(name)) for name in LRN}
    if walk.order[:2] != ["N", "C"] or len(walk.order) != 4 or not walk.layers:
        walk.refuse(node, "expected it after conv1_1, of maps (N, C, H, W)")
    _add(walk, node, found)


def lrn_of_many_nodes(walk: Walk, uses: list[Node]) -> Node | None:
    """Follow x / (bias + alpha * mean(x^2)) ^ beta, whose mean is an average pool over channels as a third axis.

    Args:
      walk: the walk at x.
      uses: the nodes that take x: the square, and the quotient.

    Returns:
      The last node; None if the nodes compute something else.

    Raises:
      Misfit: if the constants are not the paper's.
    """
    if len(uses) != 2 or walk.order != list(AXES) or not walk.layers or walk.layers[-1].kind != "relu":
        return None
    last = next(
        (n for n in uses if n.kind == "Div" and n.inputs[0] == walk.tensor and n.inputs[1:] != n.inputs[:1]), None
    )
    square = next((n for n in uses if n is not last), None)
    if last is None or square is None or not _is_square(walk, square):
        return None
    power, beta = _operation(walk, last.inputs[1:2], "Pow")
    total, bias = _operation(walk, power, "Add")
    scaled, alpha = _operation(walk, total, "Mul")
    if not scaled:
        return None
    sides = [walk.side(letter) or STAND_INS[i] for i, letter in enumerate(AXES)]
    size = _averaged_channels(walk, scaled[0], square.outputs[0], sides)
    if size is None:
        return None
    _add(walk, last, {"size": size, "alpha": alpha, "beta": beta, "bias": bias})
    return last


def _add(walk: Walk, node: Node, found: dict[str, Any]) -> None:
    """Add the layer, or refuse other constants than the paper's."""
    if any(
        not isinstance(found[key], int | float) or not math.isclose(found[key], LRN[key], rel_tol=1e-5) for key in LRN
    ):
        walk.refuse(node, f"it has {found}; expected the paper's constants, {LRN}")
    walk.layers.append(Found("lrn", node))


def _is_square(walk: Walk, node: Node) -> bool:
    by_product = node.kind == "Mul" and node.inputs == (walk.tensor, walk.tensor)
    is_power = node.kind == "Pow" and len(node.inputs) == 2 and node.inputs[0] == walk.tensor
    return by_product or (is_power and walk.values.number(node.inputs[1], 0.0) == 2)


def _operation(walk: Walk, names: tuple[str, ...], kind: str) -> tuple[tuple[str, ...], float]:
    """Return the tensor and the constant that the maker of a tensor takes; no tensor if it is another operation."""
    node = walk.values.maker(names[0]) if names else None
    if node is None or node.kind != kind or len(node.inputs) != 2:
        return (), math.nan
    first, second = node.inputs
    if kind != "Pow" and walk.values.is_constant(first):
        first, second = second, first
    number = walk.values.number(second, math.nan)
    return ((), math.nan) if math.isnan(number) else ((first,), number)


def _averaged_channels(walk: Walk, name: str, square: str, sides: list[int]) -> int | None:
    """Return over how many channels a tensor is the mean of the square; None if it is something else.

    Args:
      walk: the walk.
      name: the mean, (N, C, H, W).
      square: the squares, (N, C, H, W).
      sides: N, C, H and W, with stand-ins for unknown ones.
    """
    shapes: dict[str, Shape] = {walk.tensor: list(sides), square: list(sides)}
    deep = [sides[0], 1, *sides[1:]]
    node = _average(walk, name, shapes, sides)
    if node is None:
        return None
    kernel = node.attributes.get("kernel_shape", [])
    plain = node.attributes.get("strides", [1] * 3) == [1] * 3 == node.attributes.get("dilations", [1] * 3)
    if len(kernel) != 3 or kernel[1:] != [1, 1] or not plain or node.attributes.get("auto_pad", "NOTSET") != "NOTSET":
        return None
    pads = node.attributes.get("pads", [0] * 6)
    if any(pads) and node.attributes.get("count_include_pad", 0) != 1:
        return None
    source, padded = _before_padding(walk, node.inputs[0])
    both = [a + b for a, b in zip([0, 0, *pads[:3], 0, 0, *pads[3:]], padded or [], strict=False)]
    half = kernel[0] // 2
    if both != [0, 0, half, 0, 0, 0, 0, half, 0, 0] or kernel[0] % 2 == 0:
        return None
    split = walk.values.maker(source)
    if split is None or split.inputs[:1] != (square,):
        return None
    if split.kind == "Unsqueeze":
        return kernel[0] if walk.values.axes(split) == [1] else None
    is_deep = split.kind == "Reshape" and _target(walk, split, shapes, math.prod(sides)) == deep
    return kernel[0] if is_deep else None


def _average(walk: Walk, name: str, shapes: dict[str, Shape], sides: list[int]) -> Node | None:
    """Return the average pool whose result, with its second axis removed, is a tensor with these sides; or None."""
    is_checked = False
    for _ in range(MOST_RESHAPES):
        node = walk.values.maker(name)
        if node is None or not node.inputs:
            return None
        if node.kind == "AveragePool":
            return node if is_checked else None
        if node.kind == "If":  # PyTorch's old exporter squeezes an axis if its side is 1
            branches = [node.attributes.get(key) for key in ("then_branch", "else_branch")]
            if not isinstance(branches[0], str) or branches[0] != branches[1]:
                return None
            name = branches[0]
            continue
        if node.kind not in ("Reshape", "Squeeze", "Identity"):
            return None
        if not is_checked and node.kind != "Identity":
            is_same = _target(walk, node, shapes, math.prod(sides)) == sides
            if not (is_same if node.kind == "Reshape" else walk.values.axes(node) == [1]):
                return None
            is_checked = True
        name = node.inputs[0]
    return None


def _before_padding(walk: Walk, name: str) -> tuple[str, list[int] | None]:
    """Return the tensor before paddings of zeros, and their sum on five axes: before each, then after each."""
    array: np.ndarray | None
    total = [0] * 10
    for _ in range(MOST_PADS):
        node = walk.values.maker(name)
        if node is None or node.kind != "Pad" or not node.inputs:
            return name, total
        if len(node.inputs) == 1:  # before opset 11
            array, value = np.asarray(node.attributes.get("pads", [])), node.attributes.get("value", 0.0)
        else:
            array = walk.values.array(node.inputs[1])
            value = walk.values.number(node.inputs[2], 0.0) if len(node.inputs) > 2 else 0.0
        is_plain = node.attributes.get("mode", "constant") == "constant" and value == 0 and len(node.inputs) < 4
        if array is None or array.shape != (10,) or array.dtype.kind != "i" or not is_plain:
            break
        total = [a + int(b) for a, b in zip(total, array, strict=True)]
        name = node.inputs[0]
    return name, None


def _target(walk: Walk, node: Node, shapes: dict[str, Shape], size: int) -> list[int] | None:
    """Return the shape that a Reshape gives a tensor of a size; None if it is unknown."""
    shape = walk.values.shape(node.inputs[1], shapes) if len(node.inputs) > 1 else None
    if shape is None or any(side is None or side == 0 for side in shape):
        return None
    known = [side for side in shape if side is not None]
    if known.count(-1) == 1:
        rest = math.prod(side for side in known if side != -1)
        known[known.index(-1)] = size // rest if size % rest == 0 else 0
    return known
