"""The labels of a data set: one class, any number of classes, or numbers."""

import math
from typing import Any

import numpy as np

from vgg_jax.errors import UserError, require

Label = np.int32 | np.ndarray  # a class; or (K,) float32

LARGEST = np.finfo(np.float32).max
KINDS = {
    "class": "one class",
    "classes": "any number of classes",  # as (K,) zeros and ones
    "numbers": "numbers",
    "fractions": "numbers from 0 to 1",
}


def label_kind(features: Any) -> tuple[str, int] | None:
    """Return the kind of the labels, from `KINDS`, and how many classes or numbers there are.

    Args:
      features: the FeaturesDict of a TFDS data set. `label` is a ClassLabel, a Sequence of ClassLabels, or a Scalar or
        Tensor of numbers, with one axis at most.

    Returns:
      None if there is no `label` of one of these features.
    """
    tfds = require("tensorflow_datasets", "train").features
    if "label" not in features:
        return None
    label: Any = features["label"]
    if isinstance(label, tfds.ClassLabel):
        return ("class", label.num_classes) if label.num_classes else None
    if isinstance(label, tfds.Sequence) and isinstance(label.feature, tfds.ClassLabel):
        return ("classes", label.feature.num_classes) if label.feature.num_classes else None
    if type(label) not in (tfds.Tensor, tfds.Scalar):
        return None
    is_number = np.issubdtype(label.np_dtype, np.number) or np.issubdtype(label.np_dtype, np.bool_)
    if not is_number or len(label.shape) > 1 or None in label.shape:
        return None
    return "numbers", math.prod(label.shape)


def read_label(kind: str, found: Any, count: int) -> Label:
    """Return the label of a record as the loss takes it.

    Args:
      kind: the kind of the labels, from `KINDS`.
      found: the label in the record.
      count: the number of classes or numbers.

    Returns:
      The class, or (count,) float32: a one for each of several classes, or the numbers.

    Raises:
      UserError: if a class does not exist, or a number is not finite or not from 0 to 1 as it should be.
    """
    values = np.asarray(found).reshape(-1)
    if kind in ("class", "classes"):
        bad = values[(values < 0) | (values >= count)]
        expected = f"0 to {count - 1}"
    else:
        lowest, highest = (-LARGEST, LARGEST) if kind == "numbers" else (0, 1)
        inside = (values >= lowest) & (values <= highest)  # False for NaN
        bad = values[~inside]
        expected = "finite numbers" if kind == "numbers" else "numbers from 0 to 1, because config.loss is sigmoid"
    if len(bad):
        raise UserError(f"label {bad[0]}; expected {expected}")
    if kind == "class":
        return np.int32(values[0])
    if kind == "classes":
        several = np.zeros(count, np.float32)
        several[values.astype(np.int64)] = 1
        return several
    return values.astype(np.float32)
