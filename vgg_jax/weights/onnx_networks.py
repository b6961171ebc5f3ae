"""VGG networks of ONNX graphs, recognized by their structure, whatever their nodes are called."""

import math
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np

from vgg_jax.errors import UserError
from vgg_jax.model import VGG
from vgg_jax.weights import onnx_head, onnx_layers
from vgg_jax.weights.layouts import table
from vgg_jax.weights.onnx_adaptive import adaptive_pool
from vgg_jax.weights.onnx_files import Node, OnnxFile
from vgg_jax.weights.onnx_lrn import lrn, lrn_of_many_nodes
from vgg_jax.weights.onnx_trunk import Trunk, fold_some, match_trunk
from vgg_jax.weights.onnx_walk import AXES, Found, Misfit, Walk, arithmetic, consumers, start, transpose

SKIPPED = ("Identity", "Dropout")
FLOAT_TYPES = (1, 10, 11, 16)  # float32, float16, float64 and bfloat16 in ONNX's numbers


def cast(walk: Walk, node: Node) -> None:
    """Follow a cast to floats, which changes only the precision."""
    if node.attributes.get("to") not in FLOAT_TYPES:
        walk.refuse(node, "it casts to another type than floats")


HANDLERS: dict[str, Callable[[Walk, Node], None]] = {
    "Transpose": transpose,
    "Cast": cast,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), arithmetic),
    "Pad": onnx_layers.pad,
    "Conv": onnx_layers.conv,
    "BatchNormalization": onnx_layers.batch_norm,
    "Relu": onnx_layers.relu,
    "Clip": onnx_layers.clip,
    "LRN": lrn,
    **dict.fromkeys(("MaxPool", "AveragePool"), onnx_head.pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), onnx_head.global_pool),
    **dict.fromkeys(("ReduceMean", "ReduceMax"), onnx_head.reduce),
    "Gather": onnx_head.gather,
    "Flatten": onnx_head.flatten,
    "Reshape": onnx_head.reshape,
    "Squeeze": onnx_head.squeeze,
    "Gemm": onnx_head.gemm,
    "MatMul": onnx_head.matmul,
    **dict.fromkeys(("Softmax", "LogSoftmax", "Sigmoid"), onnx_head.softmax),
}
QUANTIZED = "the network is quantized; expected floats: load the file that it was quantized from"
OPTIMIZED = "ONNX Runtime has fused its layers; expected ONNX's own operations: load the file before optimization"
FEATURES_REMEDY = "load its convolutional part alone with features_only=True or --features-only"


class OnnxNetwork(NamedTuple):
    """A network as an ONNX graph holds it."""

    model: VGG
    arrays: dict[str, np.ndarray]  # under torchvision's names
    outputs: str | None  # what the last operation shows about the logits
    notes: tuple[str, ...]
    sides: range | None  # sides of square images that give the map that the head flattens; None: any
    walk: Walk
    pool: str | None  # the kind of the pool before the head; None: the graph has none


def from_onnx(file: OnnxFile, features_only: bool = False) -> OnnxNetwork:
    """Convert an ONNX graph into a model and its arrays.

    Args:
      file: the content of the file.
      features_only: stop at the first node after the convolutions that no VGG has.

    Returns:
      The network. Its arrays are views of the file's, or copies if a batch norm or a product was folded in.

    Raises:
      UserError: if the graph is no VGG; the message names the first node that does not fit.
    """
    with np.errstate(all="ignore"):  # numbers that are not finite are refused later
        walk = start(file)
        try:
            notes, end = _follow(walk, file, features_only)
        except Misfit as error:
            if _is_complete(walk.layers):
                raise UserError(f"{error}; {FEATURES_REMEDY}") from None
            raise
        layers = fold_some(walk.layers)
        trunk = match_trunk(layers)
        try:
            network = _with_head(walk, layers, trunk, end is not None)
        except UserError as error:
            if not features_only:
                raise UserError(f"{error}; {FEATURES_REMEDY}") from None
            left = layers[trunk.length].node
            network = _with_head(walk, layers[: trunk.length], trunk, True)
            end = left
    if end is not None:
        notes.append(f"the head is left out, from {end}")
    return network._replace(notes=(*notes, *network.notes))


def _is_complete(layers: list[Found]) -> bool:
    """Return whether the layers begin with all the convolutions of a VGG."""
    try:
        return match_trunk(fold_some(layers)).is_complete
    except UserError:
        return False


def _follow(walk: Walk, file: OnnxFile, features_only: bool) -> tuple[list[str], Node | None]:
    """Follow the graph to its end; return the notes, and the node at which the walk stopped early, if it did."""
    following, notes = consumers(file), list[str]()
    for _ in range(len(file.nodes)):
        nodes = following.get(walk.tensor, [])
        if not nodes:
            break
        node = nodes[0]
        try:
            if last := lrn_of_many_nodes(walk, nodes):
                walk.move(last.outputs[0])
                continue
            if len(nodes) > 1:
                walk.refuse(nodes[1], f"it takes the input of {node}; a VGG is one chain of layers")
            if node.kind not in SKIPPED:
                handler = HANDLERS.get(node.kind)
                if handler is None:
                    walk.refuse(node, _unknown(node))
                handler(walk, node)
        except Misfit:
            if _skip_adaptive_pool(walk):
                continue
            if features_only and any(layer.kind == "conv" for layer in walk.layers):
                return notes, node
            raise
        if not node.outputs:
            walk.refuse(node, "it has no output")
        walk.move(node.outputs[0])
    if walk.tensor not in file.outputs:
        raise UserError(
            f"its chain of layers ends with {walk.tensor[:80]!r}; expected an output of the graph, "
            f"{', '.join(file.outputs)[:80]}: export the network again"
        )
    if len(file.outputs) > 1:
        others = [name for name in file.outputs if name != walk.tensor]
        notes.append(f"its other outputs are left out: {', '.join(others)[:80]}")
    return notes, None


def _unknown(node: Node) -> str:
    """Return why no VGG has a node."""
    if node.kind.startswith("QLinear") or "QuantizeLinear" in node.kind:
        return QUANTIZED
    return OPTIMIZED if node.kind.startswith("com.microsoft.") else "a VGG has no such operation"


def _skip_adaptive_pool(walk: Walk) -> bool:
    """Return whether an adaptive pool of many nodes follows the last layer; if so, add it."""
    tensor, order = walk.mark
    if not walk.layers or walk.layers[-1].kind not in ("relu", "pool") or order != list(AXES):
        return False
    found = adaptive_pool(walk, tensor)
    if found is None:
        return False
    node, output, target = found
    walk.layers.append(Found("head_pool", node, pool="average", target=target))
    walk.order, walk.sides = order, walk.sides | dict.fromkeys("HW", target)
    walk.move(output)
    return True


def _with_head(walk: Walk, layers: list[Found], trunk: Trunk, is_cut: bool) -> OnnxNetwork:
    """Return the network of the convolutional part and the layers after it.

    Args:
      walk: the walk that found the layers.
      layers: all layers.
      trunk: the convolutional part.
      is_cut: whether a head may be missing because the walk stopped before its end.
    """
    after, model, notes = layers[trunk.length :], trunk.model, list[str]()
    named = [(name, layers[place]) for place, name in trunk.names.items()]
    if not after and (not is_cut or not trunk.is_complete):
        if not trunk.is_complete:
            notes.append(f"it is VGG-{model.depth}, the shallowest with such convolutions, up to {trunk.last}")
        return _network(walk, model.clone(final_layer=trunk.last), named, notes)
    if not trunk.is_complete and after:
        _refuse(after[0], "the convolutions of a VGG before it")
    if not after:
        return _network(walk, model, named, notes)
    return _head(walk, model, named, after)


def _head(walk: Walk, model: VGG, named: list[tuple[str, Found]], after: list[Found]) -> OnnxNetwork:
    """Return the network with its head."""
    channels = len(named[-1][1].arrays["bias"])
    outputs = after.pop().kind if after[-1].kind in ("softmax", "sigmoid") else None
    last = named[-1][1] if not after else after[-1]
    pool = after.pop(0) if after and after[0].kind in ("head_pool", "pool") else None
    dense, is_timms, flat = _dense_layers(after)
    if flat is None:
        _refuse(after[-1] if after else last, "a flattened map after it")
    size = _pool_size(dense, channels, pool, flat)
    if is_timms and pool and not all(after == max(before, size) for before, after in pool.sides):
        _refuse(pool, f"a pool to {size} positions if the map has fewer, as in timm's head")
    if pool and pool.pool and pool.target is None and not is_timms:
        _refuse(pool, "a pool to a square map")
    widths = tuple(len(layer.arrays["bias"]) for layer in dense)
    operations = [layer.kind for layer in after if layer.kind not in ("flatten", "head_pool")]
    is_representation = operations[-1:] in ([], ["relu"])
    window = 2 ** len(model.pool_after)
    sides = range(size * window, (size + 1) * window) if pool is None and not is_timms else None
    if len(widths) > (2 if is_representation else 3):
        _refuse(dense[-1], "at most two hidden dense layers, and one that gives the classes")
    if not widths and size > 1 and flat.order != "HWC":
        _refuse(flat, "a map flattened in the order height, width, channels if no dense layer follows")
    model = model.clone(
        num_classes=None if is_representation else widths[-1],
        hidden=widths if is_representation else widths[:-1],
        pool_size=size,
        head_pool="max" if pool and (pool.pool == "max" or pool.kind == "pool") else "average",
        conv_head=is_timms,
    )
    for name, layer in zip(model.head_layers, dense, strict=True):
        kernel = layer.arrays["kernel"]
        if layer is dense[0] and flat.order == "HWC" and kernel.ndim == 2:
            kernel = kernel.reshape(len(kernel), size, size, channels).transpose(0, 3, 1, 2)
        named.append((name, Found("dense", layer.node, {**layer.arrays, "kernel": kernel.reshape(len(kernel), -1)})))
    kind = None if pool is None else pool.pool or None
    return _network(walk, model, named, [], outputs, sides, kind)


def _dense_layers(after: list[Found]) -> tuple[list[Found], bool, Found | None]:
    """Return the dense layers of a head, whether it is timm's, and the flattening; refuse what is no head."""
    dense, flat, averaged = list[Found](), None, None
    before = ""
    for layer in after:
        is_dense = layer.kind in ("dense", "conv")
        if is_dense and before == "dense":
            _refuse(layer, "a ReLU between dense layers")
        if layer.kind == "conv" and (flat or averaged or (dense and layer.kernel != 1)):
            _refuse(layer, "dense layers in the head")
        if layer.kind == "dense" and not flat:
            _refuse(layer, "a flattened map before it")
        if layer.kind == "flatten" and flat is None:
            flat = layer
        elif layer.kind == "head_pool" and averaged is None and not flat and len(dense) == 2 and before == "relu":
            averaged = layer
        elif layer.kind == "relu" and before == "dense":
            pass
        elif is_dense:
            dense.append(layer)
        else:
            _refuse(layer, "dense layers and ReLUs after the pool")
        before = "dense" if is_dense else layer.kind
    if averaged is not None and (
        averaged.pool not in ("average", "") or (averaged.pool, averaged.target) == ("", None)
    ):
        _refuse(averaged, "an average after timm's convolutional head")
    slides = bool(dense) and dense[0].kind == "conv"
    return dense, slides and averaged is not None, flat


def _pool_size(dense: list[Found], channels: int, pool: Found | None, flat: Found) -> int:
    """Return the side of the map that the head takes, by the width of its first layer."""
    stated = pool.target if pool else None
    if not dense:
        return stated or _refuse(flat, "a pool of known size before it")
    kernel = dense[0].arrays["kernel"]
    area, rest = divmod(math.prod(kernel.shape[1:]), channels)
    size = math.isqrt(area)
    if rest or not area or size**2 != area or size > 256:
        _refuse(dense[0], f"one that takes {channels} numbers for each position of a square map")
    if pool and pool.pool and stated not in (None, size):
        _refuse(dense[0], f"one that takes the {stated}x{stated} positions of {pool.node}")
    return size


def _refuse(layer: Found, expected: str) -> NoReturn:
    kernel = f" with a kernel of {layer.arrays['kernel'].shape}" if "kernel" in layer.arrays else ""
    raise Misfit(f"its {layer.node} does not fit a VGG: found {layer.kind}{kernel}; expected {expected}")


def _network(
    walk: Walk,
    model: VGG,
    named: list[tuple[str, Found]],
    notes: list[str],
    outputs: str | None = None,
    sides: range | None = None,
    pool: str | None = None,
) -> OnnxNetwork:
    """Return the network with the dtype of its arrays."""
    leaves = {(name, leaf): array for name, layer in named for leaf, array in layer.arrays.items()}
    dtype = np.result_type(*{array.dtype for (_, leaf), array in leaves.items() if leaf == "kernel"})
    folded = any(layer.scaled for _, layer in named) and not model.batch_norm
    model = model.clone(param_dtype=jnp.dtype(dtype), dtype=jnp.promote_types(dtype, jnp.float32), folded=folded)
    if folded:
        notes = [*notes, "its batch norm is folded into the convolutions: the network is for evaluation"]
    channels = named[0][1].arrays["kernel"].shape[1]
    arrays = {entry.name: leaves[entry.path[1:]] for entry in table(model, channels) if entry.path[1:] in leaves}
    return OnnxNetwork(model, arrays, outputs, tuple(notes), sides, walk, pool)
