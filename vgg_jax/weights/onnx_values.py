"""The constants of an ONNX graph, and the shapes that it computes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vgg_jax.errors import UserError
from vgg_jax.weights.onnx_files import Node, OnnxFile, to_array

DEEPEST = 40  # nodes from a constant or a shape to its use
MOST_AXES = 8
MOST_NUMBERS = 64  # of a constant that is put together of others

Shape = list[int | None]  # None: unknown


class Values:
    """The constants of a graph by name, with those that nodes compute from others."""

    def __init__(self, file: OnnxFile) -> None:
        self._file = file
        self._makers = {output: node for node in file.nodes for output in node.outputs if output}
        self._arrays: dict[str, np.ndarray | None] = {}

    def maker(self, name: str) -> Node | None:
        """Return the node that computes a tensor, or None."""
        return self._makers.get(name)

    def is_constant(self, name: str) -> bool:
        """Return whether a name is that of a constant."""
        return self.array(name) is not None

    def array(self, name: str, depth: int = 0) -> np.ndarray | None:
        """Return a constant, or None if the name is not one.

        A cast of floats is left out, so that weights have the dtype in which the file holds them.

        Raises:
          UserError: if the tensor is damaged.
        """
        if name not in self._arrays:
            if name in self._file.tensors:
                self._arrays[name] = to_array(self._file.tensors[name], self._file.path)
            else:
                self._arrays[name] = None  # also while it is computed: a graph may run in circles
                self._arrays[name] = self._computed(name, depth)
        return self._arrays[name]

    def number(self, name: str, default: float) -> float:
        """Return a constant of one number; the default if the name is empty; NaN if it is something else."""
        if not name:
            return default
        array = self.array(name)
        return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else float("nan")

    def integers(self, name: str) -> list[int] | None:
        """Return a constant of a few integers, or None if it is something else."""
        array = self.array(name) if name else None
        if array is None or array.dtype.kind not in "iu" or array.size > MOST_AXES or array.ndim > 1:
            return None
        return [int(number) for number in array.reshape(-1)]

    def axes(self, node: Node, place: int = 1) -> list[int] | None:
        """Return the axes of a node, which are an attribute or, since opset 13 or 18, an input; None if unknown."""
        stated = node.attributes.get("axes")
        if isinstance(stated, list):
            return stated
        return self.integers(node.inputs[place]) if len(node.inputs) > place else None

    def shape(self, name: str, shapes: Mapping[str, Shape]) -> Shape | None:
        """Return the numbers of a shape that the graph computes, with None for unknown ones; None if it is no shape.

        Args:
          name: the tensor that holds the shape.
          shapes: the shapes of the tensors that are known, by name.
        """
        return self._shape(name, shapes, {}, 0)

    def _shape(self, name: str, shapes: Mapping[str, Shape], seen: dict[str, Shape | None], depth: int) -> Shape | None:
        if name not in seen:
            seen[name] = None  # while it is computed: a graph may run in circles
            constant = self.integers(name)
            seen[name] = self._computed_shape(name, shapes, seen, depth) if constant is None else list(constant)
        return seen[name]

    def _computed_shape(
        self, name: str, shapes: Mapping[str, Shape], seen: dict[str, Shape | None], depth: int
    ) -> Shape | None:
        node = self._makers.get(name)
        if node is None or not node.inputs or depth > DEEPEST:
            return None
        if node.kind == "Shape":
            start, end = (node.attributes.get(key) for key in ("start", "end"))
            known = shapes.get(node.inputs[0], [])
            return known[start if isinstance(start, int) else 0 : end if isinstance(end, int) else None] or None
        if node.kind == "Concat":
            parts = [self._shape(part, shapes, seen, depth + 1) for part in node.inputs[:MOST_AXES]]
            return [side for part in parts for side in part or [None]][:MOST_AXES]
        source = self._shape(node.inputs[0], shapes, seen, depth + 1)
        if source is None:
            return None
        if node.kind in ("Identity", "Cast", "Unsqueeze", "Squeeze", "Reshape"):
            return source
        if node.kind == "Gather" and len(node.inputs) == 2:
            places = self.integers(node.inputs[1]) or []
            return [source[place] for place in places if -len(source) <= place < len(source)] or None
        if node.kind == "Slice" and 3 <= len(node.inputs) < 5:
            first, after = self.integers(node.inputs[1]), self.integers(node.inputs[2])
            return source[first[0] : after[0]] or None if first and after else None
        return [None] if node.kind in ("Mul", "Div", "ReduceProd") else None

    def _computed(self, name: str, depth: int) -> np.ndarray | None:
        node = self._makers.get(name)
        if node is None or not node.inputs or depth > DEEPEST or node.outputs[:1] != (name,):
            return None
        if node.kind in ("Concat", "ConstantOfShape", "Slice"):
            return self._few_numbers(node, depth)
        if node.kind not in ("Identity", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze"):
            return None
        source = self.array(node.inputs[0], depth + 1)
        if source is None:
            return None
        try:
            return self._changed(node, source)
        except (ValueError, TypeError, OverflowError, IndexError):
            raise UserError(f"its {node} does not fit its constant of shape {source.shape}") from None

    def _few_numbers(self, node: Node, depth: int) -> np.ndarray | None:
        """Return a small constant put together of others, as PyTorch's exporter writes the sides of a padding."""
        arrays = [self.array(name, depth + 1) for name in node.inputs]
        small = [array for array in arrays if array is not None and array.size <= MOST_NUMBERS]
        if len(small) < len(arrays):
            return None
        try:
            if node.kind == "Concat":
                return np.concatenate(small, node.attributes["axis"])
            if node.kind == "ConstantOfShape":
                sides = _integers(small[0].tolist())
                value = node.attributes.get("value")
                filling = np.zeros(1, np.float32) if value is None else to_array(value, self._file.path)
                return np.full(sides, filling.reshape(-1)[0]) if 0 <= math.prod(sides) <= MOST_NUMBERS else None
            source, starts, ends, *more = small
            axes, steps = more if len(more) == 2 else (np.arange(len(starts)), np.ones(len(starts), np.int64))
            parts = [slice(None)] * source.ndim
            for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
                parts[int(axis)] = slice(int(start), int(end), int(step))
            return source[tuple(parts)]
        except (KeyError, ValueError, TypeError, OverflowError, IndexError, UserError):
            return None

    def _changed(self, node: Node, source: np.ndarray) -> np.ndarray | None:
        if node.kind == "Transpose":
            return source.transpose(_integers(node.attributes.get("perm", range(source.ndim)[::-1])))
        if node.kind == "Squeeze":
            axes = self.axes(node)
            return np.squeeze(source) if axes is None else np.squeeze(source, tuple(axes))
        if node.kind == "Unsqueeze":
            axes = self.axes(node)
            return None if axes is None or source.ndim > MOST_AXES else np.expand_dims(source, tuple(axes))
        if node.kind == "Reshape":
            shape = self.integers(node.inputs[1]) if len(node.inputs) > 1 else None
            if shape is None:
                return None
            return source.reshape([source.shape[i] if side == 0 else side for i, side in enumerate(shape)])
        return source


def _integers(values: Any) -> Sequence[int]:
    return [int(value) for value in values]
