"""The nodes after the convolutions of a VGG in an ONNX graph: pools, flattening and dense layers."""

import math

import numpy as np

from vgg_jax.ops.pool_windows import averaging_matrix, window_rows
from vgg_jax.weights.onnx_files import Node
from vgg_jax.weights.onnx_walk import Found, Walk, constant

UNKNOWN = 2**20  # stands for an unknown side, which may be more than 1


def pool(walk: Walk, node: Node) -> None:
    """Follow a pool of windows: 2x2 maxima after a stage, or a pool before the head."""
    kind = "max" if node.kind == "MaxPool" else "average"
    if walk.order[:2] != ["N", "C"] or len(walk.order) != 4 or not walk.layers:
        walk.refuse(node, "expected a convolution first, and maps (N, C, H, W)")
    window = node.attributes.get("kernel_shape")
    strides, pads = node.attributes.get("strides", [1, 1]), node.attributes.get("pads", [0] * 4)
    if not isinstance(window, list) or len(window) != 2 or len(strides) != 2 or min(*window, *strides) < 1:
        walk.refuse(node, f"its windows are {window} with strides {strides}")
    letters = walk.order[2:]
    sides = [walk.side(letter) for letter in letters]
    is_whole = all(side is not None and side % n == 0 for side, n in zip(sides, window, strict=True))
    auto = node.attributes.get("auto_pad", "NOTSET")
    if auto not in ("NOTSET", "VALID") and not is_whole:
        walk.refuse(node, f"auto_pad is {auto} for maps of {sides}; expected no padding")
    if any(pads) or node.attributes.get("dilations", [1, 1]) != [1, 1]:
        walk.refuse(node, f"it pads by {pads}; expected none")
    if node.attributes.get("ceil_mode", 0) and not is_whole:
        walk.refuse(node, "it rounds the size of its output up; expected down")
    if strides != window and not (kind == "average" and window == sides):
        walk.refuse(node, f"its windows are {window} with strides {strides}; expected equal ones, as 2x2 with stride 2")
    for letter, side, n in zip(letters, sides, window, strict=True):
        walk.sides[letter] = None if side is None else side // n
    changes = tuple((side or 0, walk.side(letter) or 0) for letter, side in zip(letters, sides, strict=True))
    if walk.gathered:
        _overlapping(walk, node, window)
    elif kind == "max" and window == [2, 2]:
        walk.layers.append(Found("pool", node))
    elif window == [1, 1] or is_whole:
        target = walk.side("H") if walk.side("H") == walk.side("W") else None
        if window != [1, 1] and target is None:
            walk.refuse(node, f"it gives maps of {[walk.side(letter) for letter in letters]}; expected square ones")
        walk.layers.append(
            Found("head_pool", node, pool="" if window == [1, 1] else kind, target=target, sides=changes)
        )
    else:
        walk.refuse(node, f"its windows of {window} do not divide maps of {sides}")


def _overlapping(walk: Walk, node: Node, window: list[int]) -> None:
    """Add the max pool of gathered rows and columns, after checking that these are the windows of an adaptive pool."""
    targets = set()
    for letter, length in zip(walk.order[2:], window, strict=True):
        rows, side = walk.gathered.get(letter), walk.sides.get(f"before {letter}")
        target = walk.side(letter)
        if rows is None or side is None or target is None or target < 1:
            walk.refuse(node, "it follows rows that are taken from the map")
        expected, longest = window_rows(side, target)
        if longest != length or not np.array_equal(rows, expected):
            walk.refuse(node, "it follows other rows of the map than those of an adaptive pool")
        targets.add(target)
    if len(targets) != 1:
        walk.refuse(node, "it gives maps that are not square")
    walk.gathered.clear()
    walk.layers.append(Found("head_pool", node, pool="max", target=targets.pop()))


def gather(walk: Walk, node: Node) -> None:
    """Follow the reversal of the channels of an image, or the rows of the windows of a max pool."""
    rows = walk.values.array(node.inputs[1]) if len(node.inputs) == 2 else None
    axis = node.attributes.get("axis", 0)
    if rows is None or rows.ndim != 1 or rows.dtype.kind not in "iu" or not 0 <= axis < len(walk.order):
        walk.refuse(node, "a VGG has no such operation")
    letter = walk.order[axis]
    if not walk.layers:
        walk.front.append((node, list(walk.order)))
    elif letter in ("H", "W") and len(walk.order) == 4 and walk.side(letter) is not None:
        walk.sides[f"before {letter}"] = walk.side(letter)
        walk.gathered[letter], walk.sides[letter] = rows, len(rows)
    else:
        walk.refuse(node, "a VGG has no such operation")


def global_pool(walk: Walk, node: Node) -> None:
    """Follow the average or the maximum of each map."""
    if walk.order[:2] != ["N", "C"] or len(walk.order) != 4 or not walk.layers:
        walk.refuse(node, "expected maps (N, C, H, W)")
    _pooled(walk, node, "max" if node.kind == "GlobalMaxPool" else "average", keeps=True)


def reduce(walk: Walk, node: Node) -> None:
    """Follow the average or the maximum over the height and width."""
    axes, rank = walk.values.axes(node), len(walk.order)
    if not walk.layers or not axes or any(not -rank <= axis < rank for axis in axes):
        walk.refuse(node, "expected it over the height and width of the last map")
    if {walk.order[axis] for axis in axes} != {"H", "W"}:
        walk.refuse(node, "expected it over the height and width of the last map")
    _pooled(walk, node, "max" if node.kind == "ReduceMax" else "average", bool(node.attributes.get("keepdims", 1)))


def _pooled(walk: Walk, node: Node, kind: str, keeps: bool) -> None:
    changes = tuple((walk.side(letter) or UNKNOWN, 1) for letter in "HW")
    walk.layers.append(Found("head_pool", node, pool=kind, target=1, sides=changes))
    walk.sides.update(H=1, W=1)
    if not keeps:
        walk.order = [letter for letter in walk.order if letter not in "HW"]
        walk.layers.append(Found("flatten", node, order="CHW"))


def flatten(walk: Walk, node: Node) -> None:
    """Follow the flattening of maps."""
    rank = len(walk.order)
    if rank == 4 and walk.layers and node.attributes.get("axis", 1) in (1, -3):
        _flatten(walk, node)
    elif rank != 2 or node.attributes.get("axis", 1) not in (1, -1):
        walk.refuse(node, "expected it to keep the first axis alone, after the last map")


def reshape(walk: Walk, node: Node) -> None:
    """Follow a reshape that flattens maps or changes nothing."""
    shape = walk.values.shape(node.inputs[1], walk.shapes) if len(node.inputs) > 1 else None
    if shape is None or len(shape) != 2 or not walk.layers or len(walk.order) not in (2, 4):
        walk.refuse(node, f"it gives the shape {shape or 'of unknown numbers'}; expected a flattened map")
    images, width = shape
    sides = [walk.side(letter) for letter in walk.order[1:]]
    known = math.prod(side for side in sides if side is not None) if None not in sides else None
    if images not in (None, 0, -1, walk.side("N")) or (images == -1 and width == -1):
        walk.refuse(node, f"it gives {images} rows; expected one for each image")
    if width not in (None, -1) and known not in (None, width):
        walk.refuse(node, f"it gives rows of {width} numbers; expected {known}")
    if len(walk.order) == 4:
        _flatten(walk, node)


def squeeze(walk: Walk, node: Node) -> None:
    """Follow the removal of a height and width of 1."""
    axes, rank = walk.values.axes(node), len(walk.order)
    axes = [2, 3] if axes is None and walk.order[2:] == ["H", "W"] else axes
    if rank != 4 or not walk.layers or not axes or any(not -rank <= axis < rank for axis in axes):
        walk.refuse(node, "expected it to remove the height and width of a pooled map")
    if {walk.order[axis] for axis in axes} != {"H", "W"} or (walk.side("H"), walk.side("W")) != (1, 1):
        walk.refuse(node, "expected it to remove the height and width of a pooled map")
    _flatten(walk, node)


def _flatten(walk: Walk, node: Node) -> None:
    order = "".join(walk.order[1:])
    if walk.order[0] != "N" or order not in ("CHW", "HWC"):
        walk.refuse(node, f"it flattens maps of the axes {''.join(walk.order)}; expected NCHW or NHWC")
    walk.layers.append(Found("flatten", node, order=order))
    walk.order = ["N", "C"]


def gemm(walk: Walk, node: Node) -> None:
    """Follow a dense layer."""
    if len(walk.order) != 2 or node.inputs[:1] != (walk.tensor,):
        walk.refuse(node, "expected it after a flattened map")
    settings = {name: node.attributes.get(name, 1.0) for name in ("alpha", "beta")}
    if settings != {"alpha": 1.0, "beta": 1.0} or node.attributes.get("transA", 0):
        walk.refuse(node, f"it has {settings} and transA {node.attributes.get('transA', 0)}; expected 1 and 0")
    kernel = constant(walk, node, 1, 2)
    kernel = kernel if node.attributes.get("transB", 0) else kernel.T
    bias = np.zeros(len(kernel), kernel.dtype)
    if len(node.inputs) > 2 and node.inputs[2]:
        array = walk.values.array(node.inputs[2])
        if array is None or array.size != len(kernel) or array.shape[-1:] != (len(kernel),):
            walk.refuse(node, f"its bias is no constant of {len(kernel)} numbers")
        bias = constant(walk, node, 2, array.ndim).reshape(-1)
    _dense(walk, node, kernel, bias)


def matmul(walk: Walk, node: Node) -> None:
    """Follow a dense layer without bias, or one of the two products that average the windows of an adaptive pool."""
    if len(node.inputs) != 2 or not walk.layers:
        walk.refuse(node, "expected it after a flattened map")
    if len(walk.order) == 2:
        if node.inputs[0] != walk.tensor:
            walk.refuse(node, "its first input is not the layer before")
        kernel = constant(walk, node, 1, 2).T
        _dense(walk, node, kernel, np.zeros(len(kernel), kernel.dtype))
        return
    is_left = node.inputs[1] == walk.tensor
    matrix = constant(walk, node, 0 if is_left else 1, 2)
    matrix = matrix if is_left else matrix.T
    letter = walk.order[-2 if is_left else -1]
    target, side = matrix.shape
    is_average = (
        letter in ("H", "W")
        and letter not in walk.averaged
        and walk.side(letter) == side
        and 0 < target <= 256
        and side <= 4096
    )
    if not is_average or not np.allclose(matrix, averaging_matrix(side, target), atol=1e-6):
        walk.refuse(node, "expected a dense layer, or the average of the windows of an adaptive pool")
    walk.sides[letter], walk.averaged[letter] = target, (side, target)
    if len(walk.averaged) == 2:
        is_square = walk.side("H") == walk.side("W")
        sides = (walk.averaged["H"], walk.averaged["W"])
        walk.layers.append(Found("head_pool", node, pool="average", target=target if is_square else None, sides=sides))


def _dense(walk: Walk, node: Node, kernel: np.ndarray, bias: np.ndarray) -> None:
    if not kernel.size:
        walk.refuse(node, "it has no numbers")
    walk.layers.append(Found("dense", node, {"kernel": kernel, "bias": bias}))
    walk.sides["C"] = len(kernel)


def softmax(walk: Walk, node: Node) -> None:
    """Follow the function that makes probabilities of logits."""
    rank = len(walk.order)
    if node.kind != "Sigmoid" and (rank != 2 or node.attributes.get("axis", -1) not in (1, -1)):
        walk.refuse(node, "expected it over the classes, after the last dense layer")
    if not walk.layers or walk.layers[-1].kind != "dense":
        walk.refuse(node, "expected it after the last dense layer")
    walk.layers.append(Found("sigmoid" if node.kind == "Sigmoid" else "softmax", node))
