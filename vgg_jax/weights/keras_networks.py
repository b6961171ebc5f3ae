"""Networks of Keras' files: the columns, heads and outputs that our VGG has, read off layers and shapes."""

import itertools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax.data.preprocessing import AUTHORS, Preprocessing
from vgg_jax.errors import UserError
from vgg_jax.model import VGG
from vgg_jax.weights.imagenet_classes import is_imagenets
from vgg_jax.weights.keras_files import KerasFile, KerasLayer, base_name
from vgg_jax.weights.keras_trunks import Trunk, activation_of, describe, is_identity, read_trunk
from vgg_jax.weights.layouts import Variables

# The names of dense layers, in order: of keras.applications, and of the paper, as keras-vggface has them.
DENSE_NAMES = (("fc1", "fc2", "predictions"), ("fc6", "fc7", "fc8"))
POOLS = {"global_average_pooling2d": "average", "global_max_pooling2d": "max"}
OUTPUTS = {"softmax": "softmax", "sigmoid": "sigmoid", "linear": "values"}


class KerasNetwork(NamedTuple):
    """A network as a file of Keras holds it. The fields are those of `formats.Loaded`."""

    model: VGG
    variables: Variables
    preprocessing: Preprocessing | None
    outputs: str | None
    notes: tuple[str, ...]
    sides: range | None  # sides of square images that give the map that the head flattens; None: any


class Head(NamedTuple):
    """The layers after the convolutions."""

    fields: dict[str, Any]  # of VGG
    dense: list[KerasLayer]
    outputs: str | None = None
    notes: tuple[str, ...] = ()
    flattens: bool = False


def from_keras(file: KerasFile, features_only: bool = False) -> KerasNetwork:
    """Convert the layers of a file of Keras into a model and its variables.

    Args:
      file: the content of the file.
      features_only: leave the head out, whatever it is.

    Returns:
      The network. Its kernels are copies in the file's layout, which is ours.

    Raises:
      UserError: if the layers are not those of a VGG, or its head is one that `VGG` does not have.
    """
    trunk = read_trunk(file)
    left_out = [layer.name for layer in trunk.after if layer.arrays]
    side = trunk.map_size[0] if trunk.map_size and len(set(trunk.map_size)) == 1 else None
    notes = list(trunk.notes)
    if features_only:
        head = Head(dict(num_classes=None, hidden=(), pool_size=side or 7), [])
        notes += [f"the head is left out: {', '.join(left_out)}"] if left_out else []
    else:
        try:
            head_of = _stated_head if file.has_config else _assumed_head
            head = _no_head(file, trunk) if trunk.model.final_layer else head_of(file, trunk, side)
        except UserError as error:
            raise UserError(
                f"{error}; load its convolutional part alone with features_only=True or --features-only"
            ) from None
    dtype = trunk.convs[0].arrays[0].dtype
    model = trunk.model.clone(
        **head.fields, param_dtype=jnp.dtype(dtype), dtype=jnp.dtype(jnp.promote_types(dtype, jnp.float32))
    )
    names = [layer.name for stage in model.stages for layer in stage if layer.kind == "conv"]
    params = {
        name: _parameters(layer)
        for name, layer in zip((*names, *model.head_layers), (*trunk.convs, *head.dense), strict=True)
    }
    is_authors = _is_authors(model, trunk, head)
    if is_authors:
        notes.append(
            "keras.applications' layout with 1000 classes is taken for the paper authors' ImageNet weights: "
            "preprocessing AUTHORS"
        )
    window = 2 ** len(model.pool_after)
    sides = range(model.pool_size * window, (model.pool_size + 1) * window) if head.flattens else None
    preprocessing = AUTHORS if is_authors else None
    return KerasNetwork(model, {"params": params}, preprocessing, head.outputs, (*notes, *head.notes), sides)


def _is_authors(model: VGG, trunk: Trunk, head: Head) -> bool:
    """Return whether the network has the layout and the sizes of the ImageNet networks of keras.applications."""
    return (
        [base_name(layer.name) for layer in head.dense] == list(DENSE_NAMES[0])
        and all(layer.name.startswith("block") for layer in trunk.convs)
        and model.depth in (16, 19)
        and is_imagenets(model, trunk.convs[0].arrays[0].shape[2])
        and not trunk.has_front
    )


def _parameters(layer: KerasLayer) -> dict[str, jnp.ndarray]:
    """Return a copy of the kernel and the bias, which is zero if the layer has none."""
    kernel = layer.arrays[0]
    bias = layer.arrays[1] if len(layer.arrays) > 1 else np.zeros(kernel.shape[-1], kernel.dtype)
    for array in (kernel, bias):
        if array.dtype != jax.dtypes.canonicalize_dtype(array.dtype):
            raise UserError(
                f"{layer.name} is float64, which JAX holds only in 64-bit mode: "
                'call jax.config.update("jax_enable_x64", True) first, or save the network in float32'
            )
        if not np.isfinite(array.astype(np.float32) if array.dtype.itemsize == 2 else array).all():
            raise UserError(f"holds numbers that are not finite, in {layer.name}")
    return {"kernel": jnp.array(kernel), "bias": jnp.array(bias)}


def _no_head(file: KerasFile, trunk: Trunk) -> Head:
    """Return the head of a truncated network, which has none; raise UserError if layers follow its last map."""
    pools = [] if file.has_config else [layer for layer in file.layers if layer.kind in (*POOLS, "flatten")]
    for layer in (*trunk.after, *pools):
        if not is_identity(layer):
            raise UserError(
                f"its convolutions end with {trunk.convs[-1].name}, and {describe(layer)} follows; expected all of a "
                "VGG's before a head"
            )
    note = f"it is VGG-{trunk.model.depth}, the shallowest with such convolutions, up to {trunk.model.final_layer}"
    return Head(dict(num_classes=None, hidden=()), [], notes=(note,))


def _stated_head(file: KerasFile, trunk: Trunk, side: int | None) -> Head:
    """Return the head as the configuration states it."""
    pool, flattens, dense, activations = None, False, list[KerasLayer](), list[str]()
    for layer in trunk.after:
        kind, settings = layer.kind, layer.settings
        if is_identity(layer):
            continue
        if kind == "flatten":
            flattens = flattens or pool is None
        elif kind in POOLS and not dense and not flattens:
            pool = POOLS[kind]
        elif kind == "average_pooling2d" and side and list(settings["pool_size"]) == [side, side] and not dense:
            pool = "average"
        elif kind == "dense" and layer.arrays and (pool or flattens):
            dense.append(layer)
            activations.append(activation_of(layer))
        elif dense and activations[-1] == "linear" and (stated := activation_of(layer)):
            activations[-1] = stated
        else:
            raise UserError(f"its head has the layer {describe(layer)}, which VGG has not")
    is_representation = bool(dense) and activations[-1] == "relu"
    hidden = dense if is_representation else dense[:-1]
    for layer, activation in zip(dense, activations, strict=True):
        expected = ["relu"] if any(layer is one for one in hidden) else list(OUTPUTS)
        if activation not in expected:
            raise UserError(f"{layer.name} has the activation {activation}; expected {', '.join(expected)}")
    outputs, notes = None, list[str]()
    if dense and not is_representation:
        outputs = OUTPUTS[activations[-1]]
        text = json.dumps(file.loss).lower()
        if outputs == "values" and '"from_logits": true' in text:
            outputs = "sigmoid" if "binary" in text else "softmax"
        elif outputs == "values":
            notes.append(
                f"{dense[-1].name} has no activation, so the outputs are taken for values; "
                "pass outputs='softmax' if they are logits"
            )
    if flattens and trunk.input_size:
        notes.append(f"takes images of {trunk.input_size[0]}x{trunk.input_size[1]} pixels")
    return _head(trunk, dense, is_representation, pool, side, outputs, notes)


def _assumed_head(file: KerasFile, trunk: Trunk, side: int | None) -> Head:
    """Return the head of a file without configuration: by the names and kinds of its layers, and by shapes."""
    dense = [layer for layer in trunk.after if layer.arrays]
    wrong = [layer for layer in dense if layer.arrays[0].ndim != 2]
    if wrong:
        raise UserError(f"its head has the layer {describe(wrong[0])}, which VGG has not")
    is_known = False
    for names in DENSE_NAMES:
        if dense and {base_name(layer.name) for layer in dense} <= set(names):
            dense = [layer for name in names for layer in dense if base_name(layer.name) == name]
            is_known = True
    unknown = [layer.name for layer in file.layers if layer.kind in ("average_pooling2d", "leaky_re_lu", "p_re_lu")]
    if unknown:
        raise UserError(f"has the layers {', '.join(unknown)} and does not state their settings; save it as .keras")
    pools = {POOLS[layer.kind] for layer in file.layers if layer.kind in POOLS}
    if len(pools) > 1:
        raise UserError("its head has global pools of averages and of maxima; expected one of them")
    pool, notes = pools.pop() if pools else None, list[str]()
    is_representation = is_known and base_name(dense[-1].name) not in ("predictions", "fc8")
    hidden = len(dense) - (0 if is_representation else 1)
    outputs = "sigmoid" if dense and not is_representation and dense[-1].arrays[0].shape[-1] == 1 else None
    if dense and (outputs or not is_known):
        notes.append(
            "a file of weights states no activations: "
            + ("ReLU after the hidden dense layers and " if hidden > 0 else "")
            + f"{outputs or 'softmax'} after the last is assumed; pass outputs if it is another"
        )
    channels = trunk.convs[-1].arrays[0].shape[-1]
    flattens_listed = any(layer.kind == "flatten" for layer in file.layers)
    if dense and pool is None and len(dense[0].arrays[0]) == channels and not flattens_listed:
        notes.append("the file does not state the pool before the head: the average of the last map is assumed")
        pool = "average"
    return _head(trunk, dense, is_representation, pool, side, outputs, notes)


def _head(
    trunk: Trunk,
    dense: list[KerasLayer],
    is_representation: bool,
    pool: str | None,
    side: int | None,
    outputs: str | None,
    notes: list[str],
) -> Head:
    """Return the head of dense layers in order, after checking that their shapes fit a VGG's."""
    widths = [layer.arrays[0].shape[-1] for layer in dense]
    for before, layer in itertools.pairwise(dense):
        if layer.arrays[0].shape[0] != before.arrays[0].shape[1]:
            raise UserError(
                f"{layer.name} takes {layer.arrays[0].shape[0]} numbers and {before.name} gives "
                f"{before.arrays[0].shape[1]}; expected dense layers that follow each other"
            )
    hidden = tuple(widths if is_representation else widths[:-1])
    if len(hidden) > 2:
        raise UserError(f"its head has {len(hidden)} hidden dense layers; expected at most two, as VGG has")
    size = 1 if pool else side or 7
    if dense:
        width, channels = dense[0].arrays[0].shape[0], trunk.convs[-1].arrays[0].shape[-1]
        size = 1 if pool else max(1, round((width / channels) ** 0.5))
        if width != channels * size**2:
            each = "" if pool else " for each position of a square map"
            raise UserError(f"{dense[0].name} takes {width} numbers; expected {channels}{each}: VGG has no other head")
    num_classes = None if is_representation or not widths else widths[-1]
    fields = dict(num_classes=num_classes, hidden=hidden, pool_size=size, head_pool=pool or "average")
    return Head(fields, dense, outputs, tuple(notes), flattens=bool(dense) and pool is None)
