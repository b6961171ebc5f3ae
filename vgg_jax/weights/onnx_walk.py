"""The layers of an ONNX graph, in order from its input: transpositions, casts and the like leave no layer."""

import dataclasses
from typing import NoReturn

import numpy as np

from vgg_jax.errors import UserError
from vgg_jax.weights.onnx_files import Node, OnnxFile
from vgg_jax.weights.onnx_values import Shape, Values

SHAPE_READERS = ("Shape", "Size")
FLOATS = ("float16", "bfloat16", "float32", "float64")
AXES = "NCHW"


class Misfit(UserError):
    """A node that is no layer of a VGG."""


@dataclasses.dataclass
class Found:
    """One layer of a graph: conv, bn, relu, lrn, pool, head_pool, flatten, dense, softmax or sigmoid."""

    kind: str
    node: Node
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # in PyTorch's layout
    kernel: int = 0  # side of a convolution's kernel
    padded: bool = True  # whether the convolution keeps the size of the maps
    scaled: bool = False  # whether a batch norm or a product is folded into the arrays
    pool: str = ""  # of a pool before the head: average or max
    target: int | None = None  # side of its output; None: unknown
    sides: tuple[tuple[int, int], ...] = ()  # height and width before and after that pool
    order: str = ""  # of a flattened map: CHW or HWC


@dataclasses.dataclass
class Walk:
    """A walk along a graph: where it is, and what is known there."""

    file: OnnxFile
    values: Values
    tensor: str
    rank: int = 4
    order: list[str] = dataclasses.field(default_factory=lambda: list("0123"))  # letters of AXES once they are known
    sides: dict[str, int | None] = dataclasses.field(default_factory=dict)
    shapes: dict[str, Shape] = dataclasses.field(default_factory=dict)
    front: list[tuple[Node, list[str]]] = dataclasses.field(default_factory=list)  # before the first layer, with order
    padding: tuple[Node, list[str]] | None = None  # a node that pads axes by 1 for the next convolution
    # Sides before and after a product with an averaging matrix.
    averaged: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    gathered: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # rows taken for the next max pool
    layers: list[Found] = dataclasses.field(default_factory=list)
    input_side: int | None = None  # of square images; None: unknown

    marked: int = 0  # the number of layers at the mark
    mark: tuple[str, list[str]] = ("", [])  # the tensor after the last layer, and its axes

    def move(self, tensor: str) -> None:
        """Move to the output of the node that was followed."""
        self.tensor = tensor
        self.shapes[tensor] = [self.side(letter) for letter in self.order]
        if len(self.layers) > self.marked:
            self.marked, self.mark = len(self.layers), (tensor, list(self.order))

    def refuse(self, node: Node, reason: str) -> NoReturn:
        """Raise Misfit for a node."""
        raise Misfit(f"its {node} does not fit a VGG: {reason}")

    def side(self, letter: str) -> int | None:
        """Return the side of an axis, or None if it is unknown."""
        return self.sides.get(letter)

    def name_axes(self) -> None:
        """Name the axes of the input after those of the maps here, which are N, C, H and W in this order."""
        if self.order[0].isdecimal():
            names = dict(zip(self.order, AXES, strict=True))
            self.sides = {names[place]: side for place, side in self.sides.items()}
            self.input_side = self.sides["H"] if self.sides["H"] == self.sides["W"] else None
            self.front = [(node, [names[place] for place in order]) for node, order in self.front]
            if self.padding:
                self.padding = self.padding[0], [names[place] for place in self.padding[1]]
            self.order = list(AXES)


def start(file: OnnxFile) -> Walk:
    """Return the beginning of a walk, at the input of the graph.

    Raises:
      UserError: if the graph has no input, several inputs, or one that is no batch of images.
    """
    if len(file.inputs) != 1:
        raise UserError(f"its graph has {len(file.inputs)} inputs; expected one: export the network alone")
    (name, (_, sides)), *_ = file.inputs.items()
    if len(sides) not in (0, 4):
        raise UserError(f"its input {name[:80]!r} has {len(sides)} axes; expected 4, of images")
    walk = Walk(file, Values(file), name)
    walk.sides = dict(zip(walk.order, sides or [None] * 4, strict=True))
    walk.shapes[name] = list(walk.sides.values())
    return walk


def consumers(file: OnnxFile) -> dict[str, list[Node]]:
    """Return the nodes that take each tensor, without those that take its shape."""
    found: dict[str, list[Node]] = {}
    for node in file.nodes:
        if node.kind not in SHAPE_READERS:
            for name in dict.fromkeys(node.inputs):
                found.setdefault(name, []).append(node)
    return found


def constant(walk: Walk, node: Node, place: int, ndim: int) -> np.ndarray:
    """Return a constant input of floats with `ndim` axes."""
    array = walk.values.array(node.inputs[place]) if len(node.inputs) > place and node.inputs[place] else None
    if array is None or array.ndim != ndim or array.dtype.name not in FLOATS:
        found = "none" if array is None else f"{array.dtype} of shape {array.shape}"
        walk.refuse(node, f"its input {place + 1} has {found}; expected constant floats with {ndim} axes")
    return array


def transpose(walk: Walk, node: Node) -> None:
    """Follow a transposition of the axes."""
    permutation = node.attributes.get("perm", list(range(len(walk.order)))[::-1])
    if sorted(permutation) != list(range(len(walk.order))):
        walk.refuse(node, f"the permutation {permutation} is not one of {len(walk.order)} axes")
    walk.order = [walk.order[i] for i in permutation]


def arithmetic(walk: Walk, node: Node) -> None:
    """Follow a sum or product with a constant for each channel: after a layer it becomes part of the layer's arrays."""
    if len(node.inputs) != 2:
        walk.refuse(node, f"it has {len(node.inputs)} inputs; expected 2")
    if not walk.layers:
        walk.front.append((node, list(walk.order)))
        return
    place = 1 if node.inputs[0] == walk.tensor else 0
    array = walk.values.array(node.inputs[place])
    last = walk.layers[-1]
    if array is None or node.inputs[0] == node.inputs[1]:
        walk.refuse(node, "it joins two branches; a VGG is one chain of layers")
    if last.kind not in ("conv", "dense", "bn") or (place == 0 and node.kind == "Div"):
        walk.refuse(node, f"it follows {last.kind}; expected it after a convolution or a dense layer")
    vector = per_channel(walk, node, array, len(last.arrays["bias"]))
    if node.kind in ("Mul", "Div"):
        factor = vector if node.kind == "Mul" else 1 / np.asarray(vector, np.float64)
        scale(last, factor)
    else:
        sign = -1 if node.kind == "Sub" else 1
        if sign < 0 and place == 0:  # constant - x
            scale(last, np.full(len(vector), -1.0))
            sign = 1
        bias = last.arrays["bias"]
        last.arrays["bias"] = (bias.astype(np.float64) + sign * vector.astype(np.float64)).astype(vector.dtype)


def scale(layer: Found, factor: np.ndarray) -> None:
    """Multiply the outputs of a layer by a factor for each channel."""
    name = "scale" if layer.kind == "bn" else "kernel"
    for key in (name, "bias"):
        array = layer.arrays[key]
        column = factor.astype(np.float64).reshape(-1, *[1] * (array.ndim - 1))
        layer.arrays[key] = (array.astype(np.float64) * column).astype(array.dtype)
    layer.scaled = True


def per_channel(walk: Walk, node: Node, array: np.ndarray, channels: int) -> np.ndarray:
    """Return the value for each channel of a constant that is broadcast over the other axes."""
    rank = len(walk.order)
    place = walk.order.index("C") if "C" in walk.order else rank - 1
    shape = [1] * (rank - array.ndim) + list(array.shape)
    if array.dtype.name not in FLOATS or array.ndim > rank or any(n != 1 for i, n in enumerate(shape) if i != place):
        walk.refuse(node, f"its constant has the shape {array.shape}; expected one number for each channel")
    if shape[place] not in (1, channels):
        walk.refuse(node, f"its constant has {shape[place]} numbers; expected {channels}")
    return np.broadcast_to(array.reshape(-1), (channels,))
