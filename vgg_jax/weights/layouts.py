"""The names and layouts of torchvision and timm, as a table that converts their weights to our variables and back."""

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax.console import note
from vgg_jax.errors import UserError
from vgg_jax.model import COLUMNS, VGG
from vgg_jax.weights.cleaning import ends_before_the_classes, has_timm_head, timm_names, torchvision_names
from vgg_jax.weights.transposed_copy import copy_blocks

Variables = dict[str, Any]


class Layout(NamedTuple):
    """The conversions of one array between PyTorch and JAX: each returns a view, which is then copied and reshaped."""

    from_torch: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


class Entry(NamedTuple):
    """One array of a network: PyTorch's name, our path, the layout, PyTorch's shape and our shape."""

    name: str
    path: tuple[str, str, str]
    layout: Layout
    shape: tuple[int, ...]
    our_shape: tuple[int, ...]


VECTOR = Layout(lambda a: a, lambda a: a)
DENSE = Layout(np.transpose, np.transpose)  # (out, in) <-> (in, out)
CONV = Layout(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))  # OIHW <-> HWIO


def dense_after_pool(size: int) -> Layout:
    """Return the layout of the first dense layer: PyTorch flattens (C, size, size), we flatten (size, size, C)."""
    return Layout(
        lambda a: a.reshape(a.shape[0], -1, size, size).transpose(2, 3, 1, 0),
        lambda a: a.reshape(size, size, -1, a.shape[1]).transpose(3, 2, 0, 1),
    )


def table(model: VGG, in_channels: int = 3) -> list[Entry]:
    """Return an entry for each array of `model`, in torchvision's order.

    Args:
      model: the network.
      in_channels: the number of channels of its images.
    """
    entries = []

    def add(name: str, collection: str, module: str, leaf: str, layout: Layout, shape: tuple[int, ...]) -> None:
        our_shape = (*shape[2:], *shape[1::-1])  # (out, in) becomes (in, out), OIHW becomes HWIO
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

    # The average of timm's head is no module of torchvision's classifier.
    for index, layer in enumerate(layer for layer in model.head if layer.kind != "average"):
        if layer.kind == "dense":
            layout = DENSE if layer.kernel_size == 1 else dense_after_pool(layer.kernel_size)
            width = channels * layer.kernel_size**2
            add(f"classifier.{index}.weight", "params", layer.name, "kernel", layout, (layer.features, width))
            add(f"classifier.{index}.bias", "params", layer.name, "bias", VECTOR, (layer.features,))
            channels = layer.features
    return entries


def from_torch(state_dict: Mapping[str, Any], model: VGG | None = None) -> tuple[VGG, Variables]:
    """Copy a state dict of torchvision or timm into a model and its variables.

    Args:
      state_dict: from names, with or without the prefix `module.`, to torch tensors or NumPy arrays.
        `num_batches_tracked` is ignored.
      model: the network of the weights. By default it is read off the state dict (see `read_model`), and a note names
        what was assumed. Pass the model if its `pool_after` is not the default.

    Returns:
      (model, variables). The variables share no memory with `state_dict`. Kernels are (H, W, in, out) or (in, out), in
      `model.param_dtype`, which by default is the dtype of the weights. Running statistics are at least float32.

    Raises:
      UserError: if names are missing or unexpected or shapes are wrong (the message lists all of them), a tensor is
        sparse, quantized or complex, or the weights are float64 and JAX's 64-bit mode is off.
    """
    arrays = torchvision_names(state_dict)
    if model is None:
        has_classes = False if ends_before_the_classes(state_dict) else None
        model, notes = read_model(arrays, has_classes, has_timm_head(state_dict))
        for line in notes:
            note(line)
    return model, to_variables(arrays, model)


def to_variables(
    arrays: Mapping[str, np.ndarray],
    model: VGG,
    check_finite: bool = False,
    forget: Callable[[], None] = lambda: None,
) -> Variables:
    """Copy arrays under torchvision's names into the variables of `model`, each once.

    Args:
      arrays: from torchvision's names to arrays.
      model: the network of the weights.
      check_finite: refuse numbers that are not finite.
      forget: called after each block of a few MB: it may release what has been copied so far from memory.

    Raises:
      UserError: as `from_torch`, or if numbers are not finite; the message lists all arrays with such numbers.
    """
    variables: Variables = {}
    bad = []
    for (collection, module, leaf), name, layout, struct in _structs(arrays, model):
        view = layout.from_torch(arrays[name])
        array, is_finite = copy_blocks(view, struct.dtype, -1, check_finite, forget)
        bad += [] if is_finite else [f"{collection}/{module}/{leaf}"]
        # The array is aligned, so that JAX uses it without another copy. Nothing else refers to it.
        leaves = variables.setdefault(collection, {}).setdefault(module, {})
        leaves[leaf] = jax.device_put(array.reshape(struct.shape))
    if bad:
        raise UserError(f"holds numbers that are not finite, in {', '.join(bad)}")
    return variables


def variable_shapes(arrays: Mapping[str, np.ndarray], model: VGG) -> Variables:
    """Return the shapes and dtypes of the variables that `to_variables` returns; read no array.

    Raises:
      UserError: as `from_torch`.
    """
    shapes: Variables = {}
    for (collection, module, leaf), _, _, struct in _structs(arrays, model):
        shapes.setdefault(collection, {}).setdefault(module, {})[leaf] = struct
    return shapes


def _structs(
    arrays: Mapping[str, np.ndarray], model: VGG
) -> list[tuple[tuple[str, str, str], str, Layout, jax.ShapeDtypeStruct]]:
    """Return the path, torchvision's name, the layout and the shape of each variable."""
    structs = []
    for name, path, layout, _, our_shape in check_fits(arrays, model):
        dtype = model.param_dtype
        if path[0] == "batch_stats":
            dtype = jnp.promote_types(dtype, jnp.float32)
        if jnp.dtype(dtype) != jax.dtypes.canonicalize_dtype(dtype):
            raise UserError(
                f"{name} is {jnp.dtype(dtype)}, which JAX holds only in 64-bit mode: "
                'call jax.config.update("jax_enable_x64", True) first, or convert the weights to float32'
            )
        structs.append((path, name, layout, jax.ShapeDtypeStruct(our_shape, dtype)))
    return structs


def to_torch(model: VGG, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the variables as a state dict of torchvision, or with `conv_head` of timm; the inverse of `from_torch`.

    Args:
      model: the network.
      variables: its variables: `params`, and `batch_stats` with batch norm.

    Returns:
      From torchvision's or timm's names to NumPy arrays, in their order and layout: kernels are (out, in, H, W) or
      (out, in). They are copies in the dtypes of `variables`; bfloat16 arrays have the dtype of ml_dtypes.
      `num_batches_tracked` of batch norm, which has no counterpart here, is 0.

    Raises:
      UserError: if arrays are missing or unexpected or shapes are wrong; the message lists all of them.
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
            state_dict[name] = copy_blocks(layout.to_torch(flat[path]), flat[path].dtype, axis=0)[0].reshape(shape)
            if name.endswith("running_var"):
                state_dict[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    if problems:
        raise UserError(f"the variables do not fit {_describe(model)}:\n  " + "\n  ".join(problems))
    return timm_names(state_dict, model.pool_size) if model.conv_head else state_dict


def check_fits(arrays: Mapping[str, np.ndarray], model: VGG) -> list[Entry]:
    """Return the table of `model`; raise UserError if arrays under torchvision's names do not fit it."""
    first = arrays.get("features.0.weight")
    entries = table(model, first.shape[1] if first is not None and first.ndim == 4 else 3)
    problems = _mismatches(arrays, entries)
    if problems:
        raise UserError(f"the state dict does not fit {_describe(model)}:\n  " + "\n  ".join(problems))
    return entries


def fits(params: Mapping[str, Mapping[str, Any]], model: VGG) -> bool:
    """Return whether arrays by layer and name have the shapes of the parameters of `model`."""
    found = {(layer, leaf): array.shape for layer, leaves in params.items() for leaf, array in leaves.items()}
    entries = table(model, found[("conv1_1", "kernel")][2])
    return found == {entry.path[1:]: entry.our_shape for entry in entries if entry.path[0] == "params"}


def read_model(
    arrays: Mapping[str, np.ndarray], has_classes: bool | None = None, conv_head: bool = False
) -> tuple[VGG, tuple[str, ...]]:
    """Return the network whose names and shapes match the arrays best, and one line for each assumption.

    Depth, lrn, conv1x1, batch norm, classes, hidden, pool_size, final_layer and param_dtype are read; `dtype` is
    param_dtype, but at least float32. Without a classifier, the network has no head: num_classes None, hidden (). If
    the convolutions end early, it is the shallowest network that begins with them.

    Args:
      arrays: from torchvision's names to arrays.
      has_classes: whether the last dense layer gives classes. By default, fc6 with 4096 outputs alone, or fc6 and an
        fc7 of as many inputs as outputs, are the representation, and end the network.
      conv_head: whether the head is timm's.

    Raises:
      UserError: if the first convolution is missing, or there are more dense layers than a VGG has.
    """
    first = arrays.get("features.0.weight")
    if first is None or first.ndim != 4 or not jnp.issubdtype(first.dtype, jnp.floating):
        found = "no features.0.weight" if first is None else f"features.0.weight {first.shape} of {first.dtype}"
        raise UserError(
            f"found {found} among {len(arrays)} names such as {sorted(arrays)[:3]}; "
            "expected torchvision's or timm's names, and floats"
        )
    convolutions = _numbered(arrays, "features", 4)
    head = _numbered(arrays, "classifier", 2)
    fields, notes = _head_fields(head, len(list(convolutions.values())[-1]), has_classes)
    common: dict[str, Any] = dict(
        **fields,
        conv_head=conv_head,
        param_dtype=jnp.dtype(first.dtype),
        dtype=jnp.promote_types(first.dtype, jnp.float32) if first.dtype != np.float64 else jnp.dtype(first.dtype),
    )
    columns: list[dict[str, Any]] = [dict(depth=depth) for depth in COLUMNS]
    columns += [dict(depth=11, lrn=True), dict(depth=16, conv1x1=True)]
    try:
        candidates = [VGG(**column, batch_norm=bn, **common) for column in columns for bn in (False, True)]
    except ValueError as error:
        raise UserError(f"its classifier is not a VGG's: {error}") from None

    def distance(model: VGG) -> int:
        return len(_mismatches(arrays, table(model, first.shape[1])))

    best = min(candidates, key=distance)
    if not head and distance(best):
        shorter = [_shortened(model, len(convolutions)) for model in candidates]
        fitting = [model for model in shorter if model and not distance(model)]
        if fitting:
            best = fitting[0]
            notes.append(
                f"the weights end after {len(convolutions)} convolutions: read as VGG-{best.depth}, the shallowest "
                f"that begins with them, up to {best.final_layer}"
            )
    return best, tuple(notes)


def _numbered(arrays: Mapping[str, np.ndarray], part: str, ndim: int) -> dict[int, np.ndarray]:
    """Return the kernels with `ndim` axes of `features` or `classifier` by their numbers, in rising order."""
    matches = [(re.fullmatch(rf"{part}\.(\d{{1,9}})\.weight", name), array) for name, array in arrays.items()]
    numbered = {int(match.group(1)): array for match, array in matches if match and array.ndim == ndim}
    return dict(sorted(numbered.items()))


def _head_fields(
    head: Mapping[int, np.ndarray], channels: int, has_classes: bool | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of VGG that describe the head, and one line for each assumption."""
    if not head:
        return dict(num_classes=None, hidden=()), []
    shapes = [kernel.shape for kernel in head.values()]
    widths = tuple(shape[0] for shape in shapes)
    pool_size = max(1, round((shapes[0][1] / channels) ** 0.5))
    if has_classes is None and list(head) in ([0], [0, 3]):
        has_classes = widths != (4096,) if len(head) == 1 else shapes[1][0] != shapes[1][1]
    if has_classes is False:
        note = f"its last layer, {shapes[-1]}, is taken for fc{5 + len(head)}: a representation, not classes"
        return dict(num_classes=None, hidden=widths, pool_size=pool_size), [note]
    return dict(num_classes=widths[-1], hidden=widths[:-1], pool_size=pool_size), []


def _shortened(model: VGG, convolutions: int) -> VGG | None:
    """Return the network up to the ReLU after its first convolutions; None if it has no more than these."""
    names = [layer.name for stage in model.stages for layer in stage if layer.kind == "conv"]
    if convolutions >= len(names):
        return None
    return model.clone(final_layer=names[convolutions - 1].replace("conv", "relu"))


def _mismatches(arrays: Mapping[str, np.ndarray], entries: list[Entry]) -> list[str]:
    """Return one line for each name that is missing or unexpected and for each wrong shape."""
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
    fields = ["depth", "batch_norm", "lrn", "conv1x1", "num_classes", "pool_size", "hidden", "pool_after"]
    fields += [name for name in ("final_layer", "head_pool", "conv_head") if getattr(model, name) != getattr(VGG, name)]
    return "VGG(" + ", ".join(f"{field}={getattr(model, field)}" for field in fields) + ")"
