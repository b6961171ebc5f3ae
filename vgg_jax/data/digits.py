"""The embedded data set: scikit-learn's 1,797 real handwritten digits, as a TFDS data set.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998;
the part that scikit-learn ships. 8x8 images of 17 grey levels, ten classes.
"""

import os
from typing import Any

import numpy as np

from vgg_jax.data.shards import Shard, serialize, write_once
from vgg_jax.errors import UserError

NAME, VERSION = "digits", "1.0.0"
NUM_TEST = 360


def prepare(data_dir: str) -> None:
    """Writes the digits once, as `data_dir`/digits/1.0.0 in array_record format; does nothing where they are.

    The test split has 360 images, stratified by class, the same always.

    Raises:
      UserError: where scikit-learn, which holds the images, is absent, or `data_dir` cannot be written.
    """
    target = os.path.join(data_dir, NAME, VERSION)
    write_once(target, lambda: _contents(target))


def _contents(target: str) -> tuple[Any, list[Shard]]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise UserError(
            f"the digits are not in {target} yet, and scikit-learn, which holds them, is not installed: "
            "pip install scikit-learn"
        ) from None
    import tensorflow_datasets as tfds
    from PIL import Image

    digits = load_digits()
    images = (digits.images * 255 / 16).round().astype(np.uint8)
    train, test = train_test_split(np.arange(len(images)), test_size=NUM_TEST, stratify=digits.target, random_state=0)
    features = {
        "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
        "label": tfds.features.ClassLabel(num_classes=10),
        "id": tfds.features.Text(),
    }
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name=NAME, version=tfds.core.Version(VERSION), data_dir=target, module_name=__name__
        ),
        features=tfds.features.FeaturesDict(features),
        description=__doc__,
        supervised_keys=("image", "label"),
    )

    def shard(split: str, indices: np.ndarray) -> Shard:
        examples = (
            {"image": Image.fromarray(images[i]), "label": int(digits.target[i]), "id": f"digit_{i:04d}"}
            for i in np.sort(indices)
        )
        return Shard(split, lambda: serialize(info, examples))

    return info, [shard("train", train), shard("test", test)]
