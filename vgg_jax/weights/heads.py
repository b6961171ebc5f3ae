"""Dense layers under any names, recognized as the head of a VGG by the chain of their shapes."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vgg_jax.weights.prefixes import natural_key

TORCHVISION = ("classifier.0", "classifier.3", "classifier.6")
CLASSES = ("6", "fc8", "head", "fc", "predictions", "score")  # the last parts of names of layers that give classes
REPRESENTATIONS = ("fc6", "fc7")


class Head(NamedTuple):
    """The dense layers of a network, as found in other people's names."""

    arrays: dict[str, np.ndarray]  # under torchvision's names
    has_classes: bool | None  # whether the last layer gives classes; None if its name does not tell
    notes: tuple[str, ...]


def match_head(modules: dict[str, dict[str, np.ndarray]], channels: int) -> Head | None:
    """Return the head that the modules form, or None if they are no head or leave several readings.

    Args:
      modules: all modules of a file that are not convolutions of its column: dense layers, or convolutions of 7x7 and
        then 1x1 in their place.
      channels: the number of channels of the last map.
    """
    if not 1 <= len(modules) <= 3 or any(set(leaves) - {"weight", "bias"} for leaves in modules.values()):
        return None
    if any("weight" not in leaves or leaves["weight"].ndim not in (2, 4) for leaves in modules.values()):
        return None
    weights = {name: leaves["weight"] for name, leaves in modules.items()}
    chain = _chain(weights, channels)
    biases = ["bias" in leaves for leaves in modules.values()]
    if chain is None or not _leave_room(chain) or any(biases) != all(biases):
        return None
    arrays, notes = {}, []
    for name, ours in zip(chain, TORCHVISION, strict=False):
        weight = weights[name]
        arrays[f"{ours}.weight"] = weight.reshape(len(weight), -1)
        arrays[f"{ours}.bias"] = modules[name].get("bias", np.zeros(len(weight), weight.dtype))
    if not all(biases):
        notes.append("its dense layers have no bias: it is zero here")
    if chain != TORCHVISION[: len(chain)]:
        notes.append(f"its head is {', '.join(chain)}: read as {', '.join(TORCHVISION[: len(chain)])}")
    if any(weight.ndim == 4 for weight in weights.values()):
        notes.append("its head consists of convolutions: read as dense layers")
    last = chain[-1].rpartition(".")[2]
    has_classes = True if last in CLASSES else False if last in REPRESENTATIONS else None
    return Head(arrays, has_classes, tuple(notes))


def _chain(weights: dict[str, np.ndarray], channels: int) -> tuple[str, ...] | None:
    """Return the one order in which each layer takes what the layer before it gives."""
    chains = [order for order in itertools.permutations(weights) if _fits([weights[name] for name in order], channels)]
    # The order of the file and of the numbers comes before that of the shapes, which may leave several.
    orders = {tuple(weights), tuple(sorted(weights, key=natural_key))} & set(chains)
    readings = list(orders) or chains
    return readings[0] if len(readings) == 1 else None


def _fits(chain: Sequence[np.ndarray], channels: int) -> bool:
    inputs, area = chain[0].shape[1], None
    if chain[0].ndim == 4:
        if inputs != channels or chain[0].shape[2:] != (7, 7):
            return False
    else:
        area, rest = divmod(inputs, channels)
        if rest or not area or math.isqrt(area) ** 2 != area:
            return False
    return all(
        after.shape[1] == before.shape[0] and (after.ndim == 2 or after.shape[2:] == (1, 1))
        for before, after in itertools.pairwise(chain)
    )


def _leave_room(chain: Sequence[str]) -> bool:
    """Return whether the numbers of the layers in one torch.nn.Sequential leave room for the ReLUs between them."""
    paths = [name.split(".") for name in chain]
    parents = {path[0] for path in paths}
    numbers = [path[1] if len(path) > 1 else path[0] for path in paths]
    if len(parents) > 1 and any(len(path) > 1 for path in paths):
        return True
    if not all(number.isdecimal() and len(number) < 9 for number in numbers):
        return True
    return all(int(b) - int(a) > 1 for a, b in itertools.pairwise(numbers))
