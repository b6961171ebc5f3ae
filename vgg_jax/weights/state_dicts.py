"""State dicts as people publish them: unwrapped, renamed where one reading is left, and read as a network."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vgg_jax.errors import UserError
from vgg_jax.model import VGG
from vgg_jax.weights.cleaning import (
    ends_before_the_classes,
    has_timm_head,
    to_numpy,
    torchvision_names,
    without_empty_classifier,
)
from vgg_jax.weights.heads import TORCHVISION, match_head
from vgg_jax.weights.layouts import check_fits, read_model
from vgg_jax.weights.prefixes import ONE, TWO, listed, strip_prefixes
from vgg_jax.weights.sequences import Features, group_modules, match_sequence
from vgg_jax.weights.wrappers import MOST_NAMES, find_state_dicts

MOST_CANDIDATES = 50  # dicts with convolutions in one checkpoint
# Names of buffers that hold the normalization of the images, one number a channel.
NORMALIZATION = {"mean", "std", "shift", "scale", "pixel_mean", "pixel_std", "mean_rgb"}
# TensorFlow's names of arrays, with slashes before them.
TENSORFLOW = {"weights": "weight", "biases": "bias", "kernel": "weight"} | {
    "gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"
}  # fmt: skip


class Reading(NamedTuple):
    """A network, as a state dict describes it."""

    model: VGG
    arrays: dict[str, np.ndarray]  # under torchvision's names
    notes: tuple[str, ...]  # what was unwrapped, renamed, assumed or left out
    is_own: bool = False  # whether the names are torchvision's or timm's as they stand
    was_empty: bool = False  # whether it had a classifier of NaN


def read_checkpoint(content: Any, features_only: bool) -> Reading:
    """Return the network in the content of a checkpoint: the one dict of tensors that fits a VGG.

    Args:
      content: what `torch.load` returned.
      features_only: leave out what does not belong to the convolutional part.

    Raises:
      UserError: if no dict fits, or several do.
    """
    candidates = find_state_dicts(content)
    if len(candidates) > MOST_CANDIDATES:
        raise UserError(f"{TWO}: {len(candidates)} dicts with convolutions; {ONE}")
    readings: dict[str, Reading] = {}
    errors: dict[str, UserError] = {}
    for path, tensors in candidates.items():
        try:
            readings[path] = read_state_dict(tensors, features_only)
        except UserError as error:
            errors[path] = error
    if len(readings) > 1:
        raise UserError(f"{TWO}: under {listed(repr(path) for path in readings)}; {ONE}")
    if not readings:
        convolutional = [path for path in errors if any(tensor.ndim == 4 for tensor in candidates[path].values())]
        path, refusal = convolutional[0], errors[convolutional[0]]
        raise UserError(f"under {path!r}: {refusal}" if path else str(refusal))
    path, reading = next(iter(readings.items()))
    if not path:
        return reading
    others = f", and not those under {listed(repr(path) for path in errors)}" if errors else ""
    return reading._replace(notes=(f"the weights are those under {path!r}{others}", *reading.notes), is_own=False)


def read_state_dict(tensors: Mapping[str, Any], features_only: bool, keeps_order: bool = True) -> Reading:
    """Return the network of a state dict.

    Args:
      tensors: from names to tensors or arrays.
      features_only: leave out what does not belong to the convolutional part.
      keeps_order: whether the names are in the order of the layers, as in PyTorch's files.

    Raises:
      UserError: if the names or shapes are not a VGG's, or leave several readings; the message lists them.
    """
    if len(tensors) > MOST_NAMES:
        raise UserError(f"holds {len(tensors):,} arrays; expected a VGG's, at most {MOST_NAMES:,}")
    arrays, dropped, is_tensorflow = _to_arrays(tensors)
    stripped, removed = strip_prefixes(arrays)
    notes = [f"removed {' and '.join(removed)} from the names"] if removed else []
    notes += [f"left out {listed(dropped)}, the normalization of its images"] if dropped else []
    notes += ["its names and layouts are TensorFlow's"] if is_tensorflow else []
    refusal: UserError | None
    try:
        reading, refusal = _read_names(stripped), None
    except UserError as error:
        refusal = error
    if refusal is not None:
        reading = _read_shapes(stripped, features_only, keeps_order and not is_tensorflow, refusal)
    is_own = refusal is None and not notes
    return reading._replace(notes=(*notes, *reading.notes), is_own=is_own)


def _read_names(arrays: Mapping[str, np.ndarray]) -> Reading:
    """Return the network of arrays under torchvision's or timm's names; raise UserError if they do not fit one."""
    renamed, was_empty = without_empty_classifier(torchvision_names(arrays))
    model, notes = read_model(renamed, False if ends_before_the_classes(arrays) else None, has_timm_head(arrays))
    check_fits(renamed, model)
    return Reading(model, renamed, notes, was_empty=was_empty)


def _read_shapes(
    arrays: Mapping[str, np.ndarray], features_only: bool, keeps_order: bool, refusal: UserError
) -> Reading:
    """Return the network that the order of the shapes describes; raise `refusal` if it describes none."""
    modules = group_modules(arrays)
    features = match_sequence(modules, keeps_order)
    if features is None:
        raise refusal
    others = {name: leaves for name, leaves in modules.items() if name not in features.modules}
    channels = next(reversed([array for array in features.arrays.values() if array.ndim == 4])).shape[0]
    head = match_head(others, channels) if features.is_complete and others else None
    if others and head is None:
        names = [f"{name}.{leaf} {array.shape}" for name, leaves in others.items() for leaf, array in leaves.items()]
        if not features_only and _has_own_names(features) and set(others) <= set(TORCHVISION):
            raise refusal
        if not features_only:
            raise UserError(
                f"{len(names)} names do not fit {_describe(features)} that the others are: {listed(names)}; expected a "
                "head of at most three dense layers: pass features_only=True (--features-only) to load the "
                "convolutional part"
            )
        left_out = (f"left out {listed(names)}",)
        model, notes = read_model(features.arrays)
        return Reading(model, features.arrays, (_by_shape(features), *features.notes, *left_out))
    together = features.arrays | (head.arrays if head else {})
    model, notes = read_model(together, head.has_classes if head else None)
    renamed = [] if _has_own_names(features) else [_by_shape(features)]
    return Reading(model, together, (*renamed, *features.notes, *(head.notes if head else ()), *notes))


def _has_own_names(features: Features) -> bool:
    return all(name.startswith("features.") and name.count(".") == 1 for name in features.modules)


def _describe(features: Features) -> str:
    model = features.model
    end = "" if features.is_complete else f" up to {model.final_layer}"
    return f"the VGG-{model.depth}{' with batch norm' if model.batch_norm else ''}{end}"


def _by_shape(features: Features) -> str:
    return (
        f"the order of their shapes tells that {features.modules[0]} ... {features.modules[-1]} are the convolutional "
        f"part of {_describe(features)}, with a ReLU after each convolution and a max pool after each stage"
    )


def _to_arrays(tensors: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], list[str], bool]:
    """Return the arrays under names with dots in PyTorch's layout, the buffers left out, and if TensorFlow wrote them.

    The counters of batch norm are dropped without a word.
    """
    arrays, dropped = {}, []
    is_tensorflow = any(name.endswith("/weights") for name in tensors)
    for name, tensor in tensors.items():
        module, _, leaf = name.replace("/", ".").removesuffix(":0").rpartition(".")
        if leaf in ("num_batches_tracked", "n_averaged", "global_step"):
            continue
        try:
            array = to_numpy(tensor)
        except UserError as error:
            raise UserError(f"{name} {error}") from None
        if leaf in NORMALIZATION and array.size <= 4:
            dropped.append(name)
            continue
        if is_tensorflow:
            leaf = TENSORFLOW.get(leaf, leaf)
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T  # HWIO to OIHW
        arrays[f"{module}.{leaf}" if module else leaf] = array
    return arrays, dropped, is_tensorflow
