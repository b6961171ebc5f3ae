"""Weights: the names and layouts of torchvision, timm and Keras <-> our variables, as tables of names."""

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from vgg_jax.errors import UserError
from vgg_jax.model import COLUMNS, VGG

Variables = dict[str, Any]


# timm's heads are convolutions; everything else has torchvision's names.
TIMM = {"pre_logits.fc1": "classifier.0", "pre_logits.fc2": "classifier.3", "head.fc": "classifier.6"}
# Keras' layers; its layouts are ours.
KERAS = {"fc1": "fc6", "fc2": "fc7", "predictions": "fc8"} | {
    f"block{s}_conv{i}": f"conv{s}_{i}" for s in range(1, 6) for i in range(1, 5)
}


class Layout(NamedTuple):
    """How one array lies in PyTorch and in JAX: each way a view, to be copied and then flattened to its shape."""

    from_torch: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


class Entry(NamedTuple):
    """One line of the table: PyTorch's name, our path, the layout, the shape in PyTorch, and ours."""

    name: str
    path: tuple[str, str, str]
    layout: Layout
    shape: tuple[int, ...]
    our_shape: tuple[int, ...]


VECTOR = Layout(lambda a: a, lambda a: a)
DENSE = Layout(np.transpose, np.transpose)  # (out, in) <-> (in, out)
CONV = Layout(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))  # OIHW <-> HWIO


def dense_after_pool(size: int) -> Layout:
    """The first fully connected layer: PyTorch flattens (C, size, size), we flatten (size, size, C)."""
    return Layout(
        lambda a: a.reshape(a.shape[0], -1, size, size).transpose(2, 3, 1, 0),
        lambda a: a.reshape(size, size, -1, a.shape[1]).transpose(3, 2, 0, 1),
    )


def table(model: VGG, in_channels: int = 3) -> list[Entry]:
    """Every array of `model` under torchvision's names, in torchvision's order."""
    entries = []

    def add(name: str, collection: str, module: str, leaf: str, layout: Layout, shape: tuple[int, ...]) -> None:
        our_shape = (*shape[2:], *shape[1::-1])  # (out, in) is (in, out) here, OIHW is HWIO
        entries.append(Entry(name, (collection, module, leaf), layout, shape, our_shape))

    channels = in_channels
    for index, layer in enumerate(itertools.chain(*model.stages)):
        prefix = f"features.{index}"
        if layer.kind == "conv":
            size = layer.kernel_size
            shape = (layer.features, channels, size, size)
            add(f"{prefix}.weight", "params", layer.name, "kernel", CONV, shape)
            add(f"{prefix}.bias", "params", layer.name, "bias", VECTOR, shape[:1])
            channels = layer.features
        elif layer.kind == "bn":
            add(f"{prefix}.weight", "params", layer.name, "scale", VECTOR, (channels,))
            add(f"{prefix}.bias", "params", layer.name, "bias", VECTOR, (channels,))
            add(f"{prefix}.running_mean", "batch_stats", layer.name, "mean", VECTOR, (channels,))
            add(f"{prefix}.running_var", "batch_stats", layer.name, "var", VECTOR, (channels,))

    width = channels * model.pool_size**2
    for index, layer in enumerate(model.head):
        if layer.kind == "dense":
            layout = DENSE if index else dense_after_pool(model.pool_size)
            add(f"classifier.{index}.weight", "params", layer.name, "kernel", layout, (layer.features, width))
            add(f"classifier.{index}.bias", "params", layer.name, "bias", VECTOR, (layer.features,))
            width = layer.features
    return entries


def from_torch(state_dict: Mapping[str, Any], model: VGG | None = None) -> tuple[VGG, Variables]:
    """Copies a state dict of torchvision's or timm's names into a model and its variables.

    Args:
      state_dict: torch tensors or NumPy arrays, their names with or without the prefix `module.`;
        `num_batches_tracked` is ignored.
      model: the network that the weights are for. By default it is read off the state dict: depth, lrn, conv1x1, batch
        norm, classes, hidden, pool_size and param_dtype (then `dtype` is param_dtype, but at least float32). Without
        a classifier it has no head: num_classes None, hidden (). A network with another `pool_after` has to be given.

    Returns:
      (model, variables), where `variables` share no memory with `state_dict`.

    Raises:
      ValueError: listing every missing or unexpected name and every wrong shape; or for float64 weights where JAX's
        64-bit mode is off.
    """
    arrays = _torchvision_names(state_dict)
    if model is None:
        model = _read_model(arrays)
    first = arrays.get("features.0.weight")
    entries = table(model, first.shape[1] if first is not None and first.ndim == 4 else 3)
    problems = _mismatches(arrays, entries)
    if problems:
        raise UserError(f"the state dict does not fit {_describe(model)}:\n  " + "\n  ".join(problems))

    variables: Variables = {}
    for name, (collection, module, leaf), layout, _, our_shape in entries:
        dtype = model.param_dtype
        if collection == "batch_stats":
            dtype = jnp.promote_types(dtype, jnp.float32)
        array = _copy(layout.from_torch(arrays[name]), dtype, axis=-1).reshape(our_shape)
        if array.dtype != jax.dtypes.canonicalize_dtype(array.dtype):
            raise UserError(
                f"{name} is {array.dtype}, which JAX holds only in 64-bit mode: "
                'call jax.config.update("jax_enable_x64", True) first, or convert the weights to float32'
            )
        variables.setdefault(collection, {}).setdefault(module, {})[leaf] = jnp.asarray(array)
    return model, variables


def to_torch(model: VGG, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: NumPy arrays under torchvision's names, in torchvision's order and layout.

    Batch norm's `num_batches_tracked`, which has no counterpart here, is 0. bfloat16 arrays have ml_dtypes' dtype.

    Raises:
      ValueError: listing every array that `variables` lack or have with another shape.
    """
    flat = {
        (collection, module, leaf): np.asarray(array)
        for collection in ("params", "batch_stats")
        for module, leaves in variables.get(collection, {}).items()
        for leaf, array in leaves.items()
    }
    first = flat.get(("params", "conv1_1", "kernel"))
    entries = table(model, first.shape[2] if first is not None and first.ndim == 4 else 3)
    known = {entry.path for entry in entries}
    problems = [f"unexpected {'/'.join(path)}" for path in flat if path not in known]
    state_dict: dict[str, np.ndarray] = {}
    for name, path, layout, shape, our_shape in entries:
        if path not in flat:
            problems.append(f"missing {'/'.join(path)}")
        elif flat[path].shape != our_shape:
            problems.append(f"{'/'.join(path)} has shape {flat[path].shape}, expected {our_shape}")
        else:
            state_dict[name] = _copy(layout.to_torch(flat[path]), flat[path].dtype, axis=0).reshape(shape)
            if name.endswith("running_var"):
                state_dict[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    if problems:
        raise UserError(f"the variables do not fit {_describe(model)}:\n  " + "\n  ".join(problems))
    return state_dict


def from_keras(arrays: Mapping[str, list[np.ndarray]]) -> tuple[VGG, Variables]:
    """Copies the weights of `keras.applications.VGG16` or `VGG19`, with or without its head.

    Args:
      arrays: from Keras' layer names (block1_conv1, ..., fc1, fc2, predictions) to [kernel, bias].

    Returns:
      (model, variables). The network wants `vgg_jax.preprocess.AUTHORS`.

    Raises:
      ValueError: listing every missing or unexpected layer and every wrong shape.
    """
    unknown = sorted(arrays.keys() - KERAS.keys())
    if unknown or not arrays:
        raise UserError(f"found layers {unknown[:5]}; expected Keras' VGG: block1_conv1, ..., fc1, fc2, predictions")
    counts = [
        f"{layer} has {len(weights)} arrays, expected 2" for layer, weights in arrays.items() if len(weights) != 2
    ]
    if counts:
        raise UserError("; ".join(counts))
    params = {KERAS[layer]: dict(zip(("kernel", "bias"), weights, strict=True)) for layer, weights in arrays.items()}
    has_head = "fc8" in params
    depth = 19 if "conv3_4" in params else 16
    model = (
        VGG(depth, num_classes=params["fc8"]["kernel"].shape[-1])
        if has_head
        else VGG(depth, num_classes=None, hidden=())
    )
    # By way of torchvision's names, which checks every name and shape.
    return from_torch(to_torch(model, {"params": params}), model)


def _copy(view: np.ndarray, dtype: Any, axis: int) -> np.ndarray:
    """A C-ordered copy, by blocks of 16 along the axis of the output features.

    A transposition that runs across the whole of fc6 misses the cache at every element: 3.2 -> 0.6 s.
    """
    copy = np.empty(view.shape, dtype)
    source, target = np.moveaxis(view, axis, 0), np.moveaxis(copy, axis, 0)
    for i in range(0, len(source), 16):
        target[i : i + 16] = source[i : i + 16]
    return copy


def _torchvision_names(state_dict: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a state dict under torchvision's names."""
    arrays = {}
    prefixed = all(name.startswith("module.") for name in state_dict)
    for name, array in state_dict.items():
        module, _, leaf = (name.removeprefix("module.") if prefixed else name).rpartition(".")
        if leaf == "num_batches_tracked":
            continue
        array = _to_numpy(array)
        module = "classifier.0" if module == "classifier" else module  # one layer, as in networks for CIFAR
        if module in TIMM:
            module = TIMM[module]
            # (out, C, 7, 7) and (out, in, 1, 1) lie as the dense layers do.
            array = array.reshape(len(array), -1) if leaf == "weight" else array
        arrays[f"{module}.{leaf}"] = array
    return arrays


def _to_numpy(array: Any) -> np.ndarray:
    """A NumPy view of a torch tensor or of anything NumPy accepts; PyTorch's bfloat16 as ml_dtypes'."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        if str(array.dtype) == "torch.bfloat16":
            import torch

            return array.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return array.numpy()
    return np.asarray(array)


def _read_model(arrays: Mapping[str, np.ndarray]) -> VGG:
    """The network whose convolutional part has the state dict's names, or else the nearest."""
    head = sorted(
        (int(match.group(1)), array.shape)
        for name, array in arrays.items()
        if (match := re.fullmatch(r"classifier\.(\d+)\.weight", name)) and array.ndim == 2
    )
    if "features.0.weight" not in arrays:
        raise UserError(
            f"found no features.0.weight among {len(arrays)} names such as {sorted(arrays)[:3]}; "
            "expected torchvision's or timm's names"
        )
    widths = tuple(shape[0] for _, shape in head)
    param_dtype = arrays["features.0.weight"].dtype
    common: dict[str, Any] = dict(
        num_classes=widths[-1] if head else None,
        hidden=widths[:-1],
        pool_size=max(1, round((head[0][1][1] / 512) ** 0.5)) if head else 7,
        param_dtype=jnp.dtype(param_dtype),
        dtype=jnp.promote_types(param_dtype, jnp.float32) if param_dtype != np.float64 else jnp.dtype(param_dtype),
    )
    columns: list[dict[str, Any]] = [dict(depth=depth) for depth in COLUMNS]
    columns += [dict(depth=11, lrn=True), dict(depth=16, conv1x1=True)]
    try:
        candidates = [VGG(**column, batch_norm=bn, **common) for column in columns for bn in (False, True)]
    except ValueError as error:
        raise UserError(f"its classifier is no VGG's: {error}") from None
    return min(candidates, key=lambda model: len(_mismatches(arrays, table(model))))


def _mismatches(arrays: Mapping[str, np.ndarray], entries: list[Entry]) -> list[str]:
    expected = {entry.name: entry.shape for entry in entries}
    missing = [f"missing {name} {shape}" for name, shape in expected.items() if name not in arrays]
    unexpected = [f"unexpected {name} {array.shape}" for name, array in arrays.items() if name not in expected]
    shapes = [
        f"{name} has shape {arrays[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in arrays and arrays[name].shape != shape
    ]
    return missing + unexpected + shapes


def _describe(model: VGG) -> str:
    fields = ("depth", "batch_norm", "lrn", "conv1x1", "num_classes", "pool_size", "hidden", "pool_after")
    return "VGG(" + ", ".join(f"{field}={getattr(model, field)}" for field in fields) + ")"
