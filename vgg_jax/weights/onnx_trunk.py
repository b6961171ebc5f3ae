"""The convolutional part of an ONNX graph, compared with each column of Table 1."""

import dataclasses
import itertools

import numpy as np

from vgg_jax.errors import UserError
from vgg_jax.model import COLUMNS, VGG, Layer
from vgg_jax.weights.folding import folded_arrays
from vgg_jax.weights.onnx_layers import EPSILON
from vgg_jax.weights.onnx_walk import Found, Misfit

TRUNK = ("conv", "bn", "relu", "lrn", "pool")


@dataclasses.dataclass
class Trunk:
    """The convolutional part of a network."""

    model: VGG  # without a head
    names: dict[int, str]  # our names of the layers with parameters, by their place among the layers
    length: int  # the number of layers that belong to it
    last: str  # the name of its last layer
    is_complete: bool  # whether it has all the convolutions of its column


def fold_some(layers: list[Found]) -> list[Found]:
    """Return the layers with batch norm folded, unless all convolutions before the head are followed by batch norm.

    Batch norm after a dense layer is always folded.
    """
    follows = [i for i, layer in enumerate(layers) if layer.kind == "bn"]
    end = next((i for i, layer in enumerate(layers) if layer.kind not in TRUNK or not layer.padded), len(layers))
    convs = [i for i, layer in enumerate(layers[:end]) if layer.kind == "conv"]
    keeps = bool(convs) and all(i + 1 in follows for i in convs)
    folded: list[Found] = []
    for i, layer in enumerate(layers):
        if layer.kind != "bn" or (keeps and i - 1 in convs):
            folded.append(layer)
            continue
        before = folded[-1]
        axes = range(before.arrays["kernel"].ndim)
        kernel = before.arrays["kernel"].transpose(*axes[1:], 0)
        statistics = {name: layer.arrays[name] for name in ("mean", "var")}
        kernel, bias = folded_arrays({**before.arrays, "kernel": kernel}, layer.arrays, statistics, EPSILON)
        dtype = np.promote_types(before.arrays["kernel"].dtype, np.float32)
        before.arrays = {"kernel": kernel.transpose(-1, *axes[:-1]).astype(dtype), "bias": bias.astype(dtype)}
        before.scaled = True
    return folded


def match_trunk(layers: list[Found]) -> Trunk:
    """Return the column of Table 1 that the first layers are.

    Args:
      layers: the layers of the graph.

    Raises:
      Misfit: if no column begins with the layers before the head; the message names the first that does not fit.
      UserError: if there is no convolution.
    """
    if not any(layer.kind == "conv" for layer in layers):
        raise UserError("its graph has no convolution at its beginning; expected those of a VGG: choose a VGG's file")
    has_norm = any(layer.kind == "bn" for layer in layers)
    columns = [*({"depth": depth} for depth in COLUMNS), {"depth": 11, "lrn": True}, {"depth": 16, "conv1x1": True}]
    best: tuple[int, str] | None = None
    for column in columns:
        model = VGG(**column, batch_norm=has_norm, num_classes=None, hidden=())  # type: ignore[arg-type]  # mixed values
        trunk, place, expected = _match(layers, model)
        if trunk:
            return trunk
        if best is None or place > best[0]:
            best = place, expected
    assert best is not None
    place, expected = best
    if place == len(layers):
        raise UserError(f"its graph ends after {place} layers; expected {expected}")
    layer = layers[place]
    shape = f" with a kernel of {layer.arrays['kernel'].shape}" if layer.kind == "conv" else ""
    raise Misfit(f"its {layer.node} does not fit a VGG: found {layer.kind}{shape}; expected {expected}")


def _match(layers: list[Found], model: VGG) -> tuple[Trunk | None, int, str]:
    """Return the trunk of a column, or None, the place of the first layer that does not fit, and what was expected."""
    place, last, names, pools = 0, "", dict[int, str](), list[int]()
    ends = False
    for stage, expected_layers in enumerate(model.stages, 1):
        for expected in expected_layers:
            found = layers[place] if place < len(layers) else None
            if expected.kind == "pool" and (found is None or found.kind != "pool"):
                continue
            if found is None:
                ends = True
                break
            if not _fits(found, expected):
                return None, place, _describe(expected)
            if expected.kind == "pool":
                pools.append(stage)
            if found.arrays:
                names[place] = expected.name
            last = expected.name
            place += 1
        if ends:
            break
    after = layers[place] if place < len(layers) else None
    is_head = after is None or after.kind not in TRUNK[:-1] or (after.kind == "conv" and after.kernel != 3)
    if not is_head:
        return None, place, "the head of a VGG"
    convs = [layer.name for layer in itertools.chain(*model.stages) if layer.kind == "conv"]
    is_complete = len(convs) == sum(name.startswith("conv") for name in names.values())
    shortened = model.clone(pool_after=tuple(pools) if is_complete else _pools_before(model, last, pools))
    return Trunk(shortened, names, place, last, is_complete), place, ""


def _pools_before(model: VGG, last: str, pools: list[int]) -> tuple[int, ...]:
    """Return the stages with a pool of a network that ends early: those found, and all after its end."""
    reached = next(s for s, stage in enumerate(model.stages, 1) if last in [layer.name for layer in stage])
    return tuple(s for s in range(1, 6) if s in pools or s > reached or (s == reached and not last.startswith("pool")))


def _fits(found: Found, expected: Layer) -> bool:
    if found.kind != expected.kind:
        return False
    if expected.kind != "conv":
        return True
    return (found.padded, found.kernel, len(found.arrays["bias"])) == (True, expected.kernel_size, expected.features)


def _describe(layer: Layer) -> str:
    if layer.kind == "conv":
        return f"{layer.name} of {layer.kernel_size}x{layer.kernel_size} and {layer.features} channels"
    return layer.name
