"""The embedded data set: scikit-learn's 1,797 real handwritten digits, as a TFDS data set.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998;
the part that scikit-learn ships: 8x8 images of 17 gray levels, ten classes.
"""

import os
from typing import Any

import numpy as np
import PIL.Image

from vgg_jax.data.prepare.shards import Shard, serialize, write_once
from vgg_jax.errors import UserError, require

NAME, VERSION = "digits", "1.0.0"
NUM_TEST = 360


def prepare(data_dir: str) -> None:
    """Write `data_dir`/digits/1.0.0 in array_record format, unless it exists.

    The test split has 360 images, stratified by class. The split is the same on every machine.

    Raises:
      UserError: if scikit-learn, which contains the images, is not installed, or if `data_dir` cannot be written.
    """
    target = os.path.join(data_dir, NAME, VERSION)
    write_once(target, lambda: _contents(target))


def _contents(target: str) -> tuple[Any, list[Shard]]:
    try:
        datasets = require("sklearn.datasets", "digits")
        model_selection = require("sklearn.model_selection", "digits")
    except UserError as error:
        raise UserError(f"{target} is missing, and scikit-learn contains its images: {error}") from None
    digits = datasets.load_digits()
    images = (digits.images * 255 / 16).round().astype(np.uint8)
    train, test = model_selection.train_test_split(
        np.arange(len(images)), test_size=NUM_TEST, stratify=digits.target, random_state=0
    )
    info = _info(target)

    def shard(split: str, indices: np.ndarray) -> Shard:
        examples = (
            {"image": PIL.Image.fromarray(images[i]), "label": int(digits.target[i]), "id": f"digit_{i:04d}"}
            for i in np.sort(indices)
        )
        return Shard(split, lambda: serialize(info, examples))

    return info, [shard("train", train), shard("test", test)]


def _info(target: str) -> Any:
    """Return TFDS's `DatasetInfo` of the digits."""
    tfds = require("tensorflow_datasets", "train")
    identity = tfds.core.DatasetIdentity(
        name=NAME, version=tfds.core.Version(VERSION), data_dir=target, module_name=__name__
    )
    features = {
        "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
        "label": tfds.features.ClassLabel(num_classes=10),
        "id": tfds.features.Text(),
    }
    return tfds.core.DatasetInfo(
        builder=identity,
        features=tfds.features.FeaturesDict(features),
        description=__doc__,
        supervised_keys=("image", "label"),
    )
