"""The nodes of the convolutional part of a VGG in an ONNX graph."""

import math

import numpy as np

from vgg_jax.weights.onnx_files import Node
from vgg_jax.weights.onnx_walk import AXES, Found, Walk, constant

EPSILON = 1e-5  # of our batch norm


def pad(walk: Walk, node: Node) -> None:
    """Follow zeros around the maps, one on each side, which belong to the next convolution."""
    pads = walk.values.integers(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get("pads")
    value = walk.values.number(node.inputs[2], 0.0) if len(node.inputs) > 2 else node.attributes.get("value", 0)
    if not isinstance(pads, list) or len(pads) != 8 or len(walk.order) != 4 or len(node.inputs) > 3:
        walk.refuse(node, "its padding is unknown")
    if node.attributes.get("mode", "constant") != "constant" or value != 0 or walk.padding is not None:
        walk.refuse(node, "it pads by something else than zeros")
    pairs = dict(zip(walk.order, zip(pads[:4], pads[4:], strict=True), strict=True))
    padded = [letter for letter, pair in pairs.items() if pair != (0, 0)]
    if padded and (len(padded) != 2 or any(pairs[letter] != (1, 1) for letter in padded)):
        walk.refuse(node, f"it pads by {pads}; expected 1 on each side of the maps")
    if padded:
        walk.padding = node, padded


def conv(walk: Walk, node: Node) -> None:
    """Follow a convolution: of 3x3 or 1x1 with padding, or a dense layer that slides over the map."""
    walk.name_axes()
    if walk.order != list(AXES):
        walk.refuse(node, f"its maps have the axes {''.join(walk.order)}; expected {AXES}")
    kernel = constant(walk, node, 1, 4)
    outputs, inputs, *sides = kernel.shape
    strides, dilations = (node.attributes.get(name, [1, 1]) for name in ("strides", "dilations"))
    group = node.attributes.get("group", 1)
    if sides[0] != sides[1] or strides != [1, 1] or dilations != [1, 1] or group != 1 or not kernel.size:
        more = "" if (dilations, group) == ([1, 1], 1) else f", dilations {dilations} and {group} groups"
        walk.refuse(
            node, f"it has a kernel of {sides[0]}x{sides[1]} and strides {strides}{more}; expected 3x3, stride 1"
        )
    if walk.side("C") not in (None, inputs):
        walk.refuse(node, f"it takes {inputs} channels, and its maps have {walk.side('C')}")
    padding = _padding(walk, node, sides[0])
    if padding not in (0, sides[0] // 2) or (padding and sides[0] % 2 == 0):
        walk.refuse(node, f"it has a kernel of {sides[0]}x{sides[0]} and a padding of {padding}; expected 3x3 and 1")
    has_bias = len(node.inputs) > 2 and node.inputs[2]
    bias = constant(walk, node, 2, 1) if has_bias else np.zeros(outputs, kernel.dtype)
    if bias.shape != (outputs,):
        walk.refuse(node, f"its bias has the shape {bias.shape}; expected {outputs} numbers")
    keeps = padding == sides[0] // 2
    pools = [layer for layer in walk.layers if layer.kind == "head_pool"]
    if pools and sides[0] == 3 and keeps:
        walk.refuse(pools[0].node, "a convolution follows it; expected max pools of 2x2 between convolutions")
    arrays = {"kernel": kernel, "bias": bias}
    walk.layers.append(Found("conv", node, arrays, kernel=sides[0], padded=keeps))
    walk.sides["C"] = outputs
    for letter in "HW":
        before = walk.side(letter)
        if before is not None and not keeps:
            if before < sides[0]:
                walk.refuse(node, f"its kernel of {sides[0]}x{sides[0]} is larger than its map")
            walk.sides[letter] = before - sides[0] + 1


def _padding(walk: Walk, node: Node, side: int) -> int:
    """Return the padding of a convolution on each side."""
    pads, auto = node.attributes.get("pads", [0] * 4), node.attributes.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER") and side % 2:
        pads = [side // 2] * 4
    elif auto not in ("NOTSET", "VALID"):
        walk.refuse(node, f"auto_pad is {auto}; expected padding by 1")
    if len(set(pads)) != 1 or len(pads) != 4:
        walk.refuse(node, f"it pads by {pads}; expected the same on each side")
    before, walk.padding = walk.padding, None
    if before and set(before[1]) != {"H", "W"}:
        walk.refuse(before[0], "it pads other axes than the height and width")
    return int(pads[0]) + (before is not None)


def batch_norm(walk: Walk, node: Node) -> None:
    """Follow batch norm by running statistics; another epsilon than ours becomes part of the variance."""
    if node.attributes.get("training_mode", 0) or not walk.layers or walk.layers[-1].kind not in ("conv", "dense"):
        walk.refuse(node, "expected it after a convolution, with running statistics")
    scale, bias, mean, var = (constant(walk, node, place, 1) for place in range(1, 5))
    channels = len(walk.layers[-1].arrays["bias"])
    if any(array.shape != (channels,) for array in (scale, bias, mean, var)):
        walk.refuse(node, f"its arrays have the shapes {scale.shape} to {var.shape}; expected {channels} numbers")
    epsilon = node.attributes.get("epsilon", EPSILON)
    if not isinstance(epsilon, float) or not 0 <= epsilon <= 1:
        walk.refuse(node, f"epsilon is {epsilon!r}")
    if not math.isclose(epsilon, EPSILON, rel_tol=1e-6):
        var = (var.astype(np.float64) + (epsilon - EPSILON)).astype(np.promote_types(var.dtype, np.float32))
        if (var < 0).any():
            walk.refuse(node, f"epsilon is {epsilon:.1e} with variances below {EPSILON}; expected {EPSILON}")
    walk.layers.append(Found("bn", node, {"scale": scale, "bias": bias, "mean": mean, "var": var}))


def relu(walk: Walk, node: Node) -> None:
    """Follow a ReLU."""
    if not walk.layers:
        walk.refuse(node, "expected a convolution first")
    if walk.layers[-1].kind != "relu":
        walk.layers.append(Found("relu", node))


def clip(walk: Walk, node: Node) -> None:
    """Follow a clipping at zero, which is a ReLU."""
    low, high = (
        walk.values.number(node.inputs[place], default)
        if len(node.inputs) > place
        else node.attributes.get(key, default)
        for place, key, default in ((1, "min", -math.inf), (2, "max", math.inf))
    )
    if low != 0 or not (isinstance(high, float) and high >= 3.4e38):
        walk.refuse(node, f"it clips to {low} and {high}; expected a ReLU")
    relu(walk, node)
