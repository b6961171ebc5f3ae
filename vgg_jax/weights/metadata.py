"""What a file of ours states beside its arrays: the network's fields, preprocessing, class names and outputs.

A .safetensors file holds these strings in its metadata, a .pth file in the `_metadata` of its state dict.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.errors import UserError
from vgg_jax.model import VGG

OUTPUTS = ("softmax", "sigmoid", "values")  # what logits can mean
PTH_KEY = "vgg_jax"  # of the strings in the `_metadata` of a state dict, for the module ""

# The dtypes are saved by their names; the other fields here do not change the function.
NOT_SAVED = (
    "parent",
    "name",
    "dtype",
    "param_dtype",
    "precision",
    "layers",
    "head_sharding",
    "batch_norm_groups",
)
MODEL_FIELDS = [field.name for field in dataclasses.fields(VGG) if field.name not in NOT_SAVED]


class Stated(NamedTuple):
    """What a file states; None for what it does not state."""

    model: VGG
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] | None = None
    outputs: str | None = None
    sides: range | None = None  # sides of square images for which the network is defined; None: any


def to_json(stated: Stated) -> dict[str, str]:
    """Return the strings to store in a file; `from_json` reads them."""
    model, preprocessing, classes, outputs, sides = stated
    metadata = {
        "vgg": json.dumps({name: getattr(model, name) for name in MODEL_FIELDS}),
        "dtype": np.dtype(model.dtype).name,
    }
    if preprocessing is not None:
        metadata["preprocessing"] = json.dumps(dataclasses.asdict(preprocessing))
    if classes is not None:
        metadata["classes"] = json.dumps(classes, ensure_ascii=False)
    if outputs is not None:
        metadata["outputs"] = outputs
    if sides is not None:
        metadata["sides"] = json.dumps([sides.start, sides.stop])
    return metadata


def from_json(metadata: Mapping[str, Any], param_dtype: Any) -> Stated | None:
    """Return what the strings of a file state; None if vgg_jax has not written them.

    Args:
      metadata: the strings by name.
      param_dtype: the dtype of the file's arrays.

    Raises:
      UserError: if the strings do not describe a VGG, or the number of class names does not fit.
    """
    if "vgg" not in metadata:
        return None
    try:
        fields = _with_tuples(json.loads(metadata["vgg"]))
        if wrong := [name for name, value in fields.items() if not _has_type(name, value)]:
            raise TypeError(f"{wrong[0]} is {fields[wrong[0]]!r:.100}")
        model = VGG(**fields, dtype=np.dtype(metadata["dtype"]), param_dtype=param_dtype)
        stated = json.loads(metadata.get("preprocessing", "null"))
        preprocessing = None if stated is None else Preprocessing(**_with_tuples(stated))
        classes = json.loads(metadata.get("classes", "null"))
        limits = json.loads(metadata.get("sides", "null"))
        sides = None if limits is None else range(*limits)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"its metadata do not describe a VGG: {error}") from None
    outputs = metadata.get("outputs")
    if classes is not None and not _fit(classes, model.num_classes):
        raise UserError(
            f"its metadata have class names that do not fit the network's {model.num_classes or 'no'} classes; "
            "expected one name for each class"
        )
    if outputs not in (None, *OUTPUTS):
        raise UserError(f"its metadata state outputs {outputs!r}; expected one of {', '.join(OUTPUTS)}")
    return Stated(model, preprocessing, None if classes is None else tuple(classes), outputs, sides)


def attach_to(state_dict: Any, metadata: Mapping[str, str]) -> None:
    """Store the strings in an OrderedDict where PyTorch keeps the versions of modules, and where it ignores them."""
    state_dict._metadata = {"": {"version": 1, PTH_KEY: dict(metadata)}}


def attached_to(state_dict: Any) -> dict[str, str]:
    """Return the strings that `attach_to` has stored; none if there are none."""
    root = getattr(state_dict, "_metadata", None)
    entry = root.get("") if isinstance(root, Mapping) else None
    strings = entry.get(PTH_KEY) if isinstance(entry, Mapping) else None
    return {k: v for k, v in strings.items() if isinstance(v, str)} if isinstance(strings, Mapping) else {}


def _has_type(name: str, value: Any) -> bool:
    """Return whether a value has the type of a field of VGG, as the default shows it."""
    default = getattr(VGG, name, None)
    if name in ("num_classes", "final_layer"):
        return value is None or type(value) is (int if name == "num_classes" else str)
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(type(item) is int for item in value)
    return type(value) is type(default) or (type(default) is float and type(value) is int)


def _fit(classes: Any, num_classes: int | None) -> bool:
    return isinstance(classes, list) and len(classes) == num_classes and all(isinstance(name, str) for name in classes)


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
