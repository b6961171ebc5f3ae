"""Convolutions under any names, recognized as those of a column of Table 1 by the order of their shapes."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vgg_jax.errors import UserError
from vgg_jax.model import COLUMNS, VGG
from vgg_jax.weights.layouts import table
from vgg_jax.weights.prefixes import ONE, TWO, natural_key

Modules = dict[str, dict[str, np.ndarray]]
CONV = ("weight", "bias")
NORM = ("weight", "bias", "running_mean", "running_var")


class Features(NamedTuple):
    """The convolutional part of a network, as found in other people's names."""

    model: VGG  # without a head
    arrays: dict[str, np.ndarray]  # under torchvision's names
    modules: tuple[str, ...]  # the names in the file that `arrays` are from
    is_complete: bool  # whether these are all convolutions of the column
    notes: tuple[str, ...]


def group_modules(arrays: Mapping[str, np.ndarray]) -> Modules:
    """Return the arrays by module: from `features.0` to {"weight": ..., "bias": ...}."""
    modules: Modules = {}
    for name, array in arrays.items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = array
    return modules


def match_sequence(modules: Modules, keeps_order: bool) -> Features | None:
    """Return the convolutional part of a VGG that the modules hold, or None.

    Args:
      modules: the modules of the file.
      keeps_order: whether the order of `modules` is that of the layers; else numbers in their names order them.

    Raises:
      UserError: if there are two networks, or the names leave two readings.
    """
    natural = {name: modules[name] for name in sorted(modules, key=natural_key)}
    named = any(_paper_name(name) for name in modules)
    orders = [modules, natural] if keeps_order and not named else [natural]
    found = [match for match in (_match(order) for order in orders) if match]
    found.sort(key=lambda match: -len(match.modules))
    if len(found) == 2 and found[0].modules != found[1].modules and len(found[0].modules) == len(found[1].modules):
        raise UserError("its convolutions have one order in the file and another by name; expected one: rename them")
    return found[0] if found else None


def _match(modules: Modules) -> Features | None:
    """Return the convolutional part that begins with the first convolution of Table 1, in the order of `modules`."""
    convs = [name for name, leaves in modules.items() if "weight" in leaves and leaves["weight"].ndim == 4]
    width = VGG(11).stages[0][0].features
    shapes = [modules[name]["weight"].shape for name in convs]
    starts = [i for i, shape in enumerate(shapes) if shape[0] == width > shape[1] and shape[2:] == (3, 3)]
    if len(starts) > 1:
        raise UserError(f"{TWO}: beginning with {', '.join(convs[i] for i in starts)}; {ONE}")
    if not starts:
        return None
    start = starts[0]
    model, count = _longest_column(shapes[start:])
    names = convs[start : start + count]
    widths = [modules[name]["weight"].shape[0] for name in names]
    norms = [name for name, leaves in modules.items() if "running_mean" in leaves]
    if norms:
        if [modules[name]["running_mean"].shape for name in norms[:count]] != [(width,) for width in widths]:
            return None
        model, norms = model.clone(batch_norm=True), norms[:count]
    layers = [layer for stage in model.stages for layer in stage if layer.kind == "conv"]
    is_complete = count == len(layers)
    if not is_complete:
        model = model.clone(final_layer=layers[count - 1].name.replace("conv", "relu"))
    # A module in between is another layer, such as a group norm; deeper convolutions do not belong to a column.
    order = list(modules)
    between = order[order.index(names[0]) : order.index(names[-1]) + 1]
    if set(between) - {*names, *norms} or (not is_complete and len(convs) > start + count):
        return None
    if any((paper := _paper_name(name)) and paper != layer.name for name, layer in zip(names, layers, strict=False)):
        return None
    kernels, notes = {name: dict(modules[name]) for name in names}, []
    notes += _check_numbers(names, [layer.name for layer in layers[:count]], model.batch_norm)
    first = convs[start - 1] if start else None
    if first and modules[first]["weight"].shape == (shapes[start][1], shapes[start][1], 1, 1):
        kernels[names[0]] = _fold(modules[first], kernels[names[0]])
        names = [first, *names]
        notes.append(f"{first}, a 1x1 convolution of the images, is folded into conv1_1")
    if not any("bias" in leaves for leaves in kernels.values()):
        for leaves in kernels.values():
            leaves["bias"] = np.zeros(len(leaves["weight"]), leaves["weight"].dtype)
        notes.append("its convolutions have no bias: it is zero here")
    arrays = _rename(model, list(kernels.values()), [modules[name] for name in norms])
    return Features(model, arrays, (*names, *norms), is_complete, tuple(notes))


def _longest_column(shapes: Sequence[tuple[int, ...]]) -> tuple[VGG, int]:
    """Return the shallowest network that begins with most of the kernels, and the number of these."""
    best, most = None, 0
    for depth, conv1x1 in (*((depth, False) for depth in COLUMNS), (16, True)):
        model = VGG(depth, conv1x1=conv1x1, num_classes=None, hidden=())
        expected = [entry.shape for entry in table(model, shapes[0][1]) if len(entry.shape) == 4]
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(shapes, expected, strict=False))
        count = len(list(pairs))
        if best is None or count > most:
            best, most = model, count
    assert best is not None
    return best, most


def _paper_name(module: str) -> str | None:
    """Return conv1_1 of a module called conv1_1, in any case and with any prefix."""
    match = re.fullmatch(r"(?:.*\.)?(conv[1-5]_[1-4])", module.lower())
    return match.group(1) if match else None


def _check_numbers(names: Sequence[str], layers: Sequence[str], batch_norm: bool) -> list[str]:
    """Check that the numbers of the convolutions in a torch.nn.Sequential leave room for the ReLUs and max pools.

    Returns:
      One line if there is one more module before each convolution.

    Raises:
      UserError: if there are pools at other places, or modules that a VGG lacks.
    """
    last = [name.rpartition(".")[2] for name in names]
    if not all(part.isdecimal() and len(part) < 9 for part in last):
        return []
    numbers = [int(part) for part in last]
    gaps = [b - a for a, b in itertools.pairwise(numbers)]
    if not gaps or min(gaps) < 1 or set(gaps) == {1}:  # several Sequentials, or a ModuleList without pools
        return []
    # Without the pools before the first convolutions of stages, all gaps are equal.
    plain = {gap - (a[4] != b[4]) for gap, (a, b) in zip(gaps, itertools.pairwise(layers), strict=True)}
    least = 3 if batch_norm else 2
    if len(plain) > 1 or min(plain) < least:
        raise UserError(
            f"its convolutions have the numbers {', '.join(map(str, numbers))}, which leave no room for the layers of "
            "a VGG between them, or have others there; expected max pools after each stage: pass the state dict and "
            "the model to from_torch"
        )
    if plain == {least}:
        return []
    return [
        "its Sequential has another module with each convolution: if it is padding by reflection, values near the "
        "border differ here, and if it computes anything, all do"
    ]


def _fold(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the convolution that equals a 1x1 convolution followed by another."""
    kernel = second["weight"].astype(np.float64)
    mixing = first["weight"][:, :, 0, 0].astype(np.float64)
    folded = dict(second, weight=np.einsum("ochw,ci->oihw", kernel, mixing).astype(second["weight"].dtype))
    if "bias" in first:
        bias = second.get("bias", np.zeros(len(kernel))) + np.einsum("ochw,c->o", kernel, first["bias"])
        folded["bias"] = bias.astype(second["weight"].dtype)
    return folded


def _rename(
    model: VGG, convs: Sequence[Mapping[str, np.ndarray]], norms: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return the arrays of the modules under torchvision's names."""
    sources = {"conv": iter(convs), "bn": iter(norms)}
    arrays: dict[str, np.ndarray] = {}
    for index, layer in enumerate(itertools.chain(*model.stages)):
        if layer.kind in sources:
            leaves = next(sources[layer.kind])
            arrays |= {f"features.{index}.{leaf}": leaves[leaf] for leaf in NORM if leaf in leaves}
    return arrays
