"""ONNX files: recognized by their content, and read into plain nodes and arrays."""

import contextlib
import math
import os
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vgg_jax.errors import UserError, first_line, require

# The fields of a ModelProto, and of a TensorProto's external data.
MODEL_FIELDS = (*range(1, 9), 14, 20, 25, 26)
IR_VERSION, GRAPH = 1, 7
# The attributes that the reader uses, by their types.
INTS = ("axes", "dilations", "kernel_shape", "pads", "perm", "strides")
INT = ("axis", "ceil_mode", "end", "group", "keepdims", "size", "start", "to", "training_mode", "transA", "transB")
FLOAT = ("alpha", "beta", "bias", "epsilon", "max", "min")
LONGEST_NAMES = 4096  # of a file beside the graph


class Node(NamedTuple):
    """One node of a graph."""

    number: int  # from 1, in the order of the file
    kind: str  # the operation, with its domain if that is not ONNX's own
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]  # numbers, texts, lists of numbers, tensors, and for graphs what `_passed` returns

    def __str__(self) -> str:
        """Return the number, the operation and the name, for messages."""
        name = self.name or ", ".join(self.outputs)
        return f"node {self.number}, {self.kind} {name[:80]!r}"


class OnnxFile(NamedTuple):
    """The content of an ONNX file."""

    nodes: list[Node]
    tensors: dict[str, Any]  # the constants by name, as TensorProto; see `to_array`
    inputs: dict[str, tuple[int, list[int | None]]]  # dtype in ONNX's numbers and sides by name; None: any
    outputs: list[str]
    metadata: dict[str, str]
    path: str


def is_onnx(path: str) -> bool:
    """Return whether the content of a file is an ONNX network: the fields of its outermost message, to the end."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        size, found = os.path.getsize(path), set()
        while file.tell() < size:
            tag = _varint(file)
            if tag is None or tag >> 3 not in MODEL_FIELDS or tag & 7 not in (0, 2):
                return False
            found.add(tag >> 3)
            number = _varint(file)
            if number is None or (tag & 7 == 2 and file.tell() + number > size):
                return False
            if tag & 7 == 2:
                file.seek(number, os.SEEK_CUR)
        return {IR_VERSION, GRAPH} <= found
    return False


def _varint(file: BinaryIO) -> int | None:
    """Return the next number of variable length; None if there is none."""
    number = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        number |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return number
    return None


def read_onnx_file(path: str) -> OnnxFile:
    """Read an ONNX file without the files beside it.

    Args:
      path: the file.

    Raises:
      UserError: if onnx is not installed, or the file is damaged.
    """
    onnx = require("onnx", "export")
    decode_error = require("google.protobuf.message", "export").DecodeError
    try:
        model = onnx.load(path, load_external_data=False)
    except (decode_error, OSError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(f"not a whole ONNX file: {first_line(error)}; export or download it again") from None
    graph = model.graph
    nodes = [_node(number, node, onnx.AttributeProto) for number, node in enumerate(graph.node, 1)]
    tensors = {_text(tensor.name): tensor for tensor in graph.initializer}
    for node in nodes:
        if node.kind == "Constant" and len(node.outputs) == 1:
            tensors[node.outputs[0]] = next(iter(node.attributes.values()), None)
    inputs = {}
    for entry in graph.input:
        if _text(entry.name) not in tensors:
            kind = entry.type.tensor_type
            inputs[entry.name] = (
                kind.elem_type,
                [
                    side.dim_value if side.HasField("dim_value") and side.dim_value > 0 else None
                    for side in kind.shape.dim
                ],
            )
    return OnnxFile(
        nodes,
        tensors,
        inputs,
        [_text(entry.name) for entry in graph.output],
        {_text(entry.key): _text(entry.value) for entry in model.metadata_props},
        path,
    )


def _text(value: str | bytes) -> str:
    """Return a text of a file; the library gives bytes that are not UTF-8 as they are."""
    return value if isinstance(value, str) else value.decode(errors="replace")


def _node(number: int, node: Any, types: Any) -> Node:
    readers: dict[int, Callable[[Any], Any]] = {
        types.FLOAT: lambda a: a.f,
        types.INT: lambda a: a.i,
        types.STRING: lambda a: _text(a.s),
        types.FLOATS: lambda a: list(a.floats),
        types.INTS: lambda a: list(a.ints),
        types.TENSOR: lambda a: a.t,
        types.GRAPH: lambda a: _passed(a.g),
    }
    attributes = {_text(a.name): readers[a.type](a) for a in node.attribute if a.type in readers}
    kind = node.op_type if node.domain in ("", "ai.onnx") else f"{_text(node.domain)}.{_text(node.op_type)}"
    inputs, outputs = (tuple(_text(name) for name in names) for names in (node.input, node.output))
    read = Node(number, _text(kind), _text(node.name), inputs, outputs, attributes)
    for names, expected in ((INTS, list), (INT, int), (FLOAT, float)):
        for name in names:
            if not isinstance(attributes.get(name, expected()), expected):
                raise UserError(f"the attribute {name} of its {read} has a wrong type; export the network again")
    return read


def _passed(graph: Any) -> str:
    """Return the outer tensor that the branch of an If only passes on or squeezes; an empty text if it does more."""
    makers = {_text(name): node for node in graph.node for name in node.output}
    name = _text(graph.output[0].name) if len(graph.output) == 1 else ""
    for _ in range(len(makers)):
        node = makers.get(name)
        if node is None:
            return name
        if _text(node.op_type) not in ("Identity", "Squeeze") or not node.input:
            return ""
        name = _text(node.input[0])
    return "" if name in makers else name


def to_array(tensor: Any, path: str) -> np.ndarray:
    """Return the array of a tensor, a number or a list of numbers; that of another file as a view of this file.

    Args:
      tensor: a TensorProto, or the value of a Constant node.
      path: the file of the graph; a file of tensors must be in its folder.

    Raises:
      UserError: if the tensor is damaged or of another kind than numbers.
    """
    if isinstance(tensor, int | float | list):
        try:
            return np.asarray(tensor)
        except (ValueError, OverflowError):
            raise UserError("holds a constant that is not a number") from None
    if not hasattr(tensor, "data_type"):
        raise UserError("holds a constant that is not a tensor of numbers")
    onnx = require("onnx", "export")
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"the tensor {tensor.name!r} has the unknown type {tensor.data_type}") from None
    shape = tuple(tensor.dims)
    if dtype.kind not in "fiubV" or any(side < 0 for side in shape):
        raise UserError(f"the tensor {tensor.name!r} has the type {dtype} and the shape {shape}; expected numbers")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return _from_file(tensor, dtype, shape, path)
    if tensor.HasField("raw_data") and len(tensor.raw_data) != math.prod(shape) * dtype.itemsize:
        raise UserError(
            f"the tensor {tensor.name!r} has {len(tensor.raw_data):,} bytes; expected "
            f"{math.prod(shape) * dtype.itemsize:,} for {dtype} and the shape {shape}"
        )
    try:
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(f"the tensor {tensor.name!r} cannot be read: {first_line(error)}") from None


def _from_file(tensor: Any, dtype: np.dtype, shape: tuple[int, ...], path: str) -> np.ndarray:
    """Return a view of the file that holds a tensor; it must be a plain file in the folder."""
    entries = {_text(entry.key): _text(entry.value) for entry in tensor.external_data}
    location, expected = entries.get("location", ""), math.prod(shape) * dtype.itemsize
    numbers = [entries.get("offset", "0"), entries.get("length", str(expected))]
    if not all(number.isascii() and number.isdecimal() and len(number) < 19 for number in numbers):
        raise UserError(f"the tensor {tensor.name!r} has a damaged place in {location[:80]!r}")
    offset, length = (int(number) for number in numbers)
    if not location or len(location) > LONGEST_NAMES or "\0" in location:
        raise UserError(f"the tensor {tensor.name!r} is in another file, which is not named")
    folder = os.path.dirname(os.path.abspath(path))
    beside = os.path.join(folder, location)
    # Both files may be links into one folder, as in the cache of the Hugging Face hub.
    roots = [os.path.realpath(folder), os.path.dirname(os.path.realpath(path))]
    if os.path.isabs(location) or not any(
        os.path.realpath(beside).startswith(root.rstrip(os.sep) + os.sep) for root in roots
    ):
        raise UserError(
            f"the tensor {tensor.name!r} is in {location[:80]!r}; expected a file in the folder of the graph"
        )
    if not os.path.isfile(beside):
        raise UserError(f"{location[:80]} is missing, which holds its tensors: put it into the folder of the graph")
    if length != expected or offset + length > os.path.getsize(beside):
        raise UserError(
            f"{location[:80]} has {os.path.getsize(beside):,} bytes; expected {expected:,} at {offset:,} for "
            f"{tensor.name!r}: copy the file that belongs to the graph"
        )
    if not expected:
        return np.zeros(shape, dtype)
    flat = np.memmap(beside, np.uint8, "r", offset, (length,)).view(np.ndarray)
    return flat.view(dtype).reshape(shape)
