"""The embedded data set: scikit-learn's 1,797 real handwritten digits, as a TFDS data set.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998;
the part that scikit-learn ships. 8x8 images of 17 grey levels, ten classes.
"""

import os
import shutil
import tempfile

import numpy as np

from vgg_jax.errors import UserError

NAME, VERSION = "digits", "1.0.0"
NUM_TEST = 360


def prepare(data_dir: str) -> None:
    """Writes the digits once, as `data_dir`/digits/1.0.0 in array_record format; does nothing where they are.

    The test split has 360 images, stratified by class, the same always. The directory appears whole or not at all.

    Raises:
      UserError: where scikit-learn, which holds the images, is absent, or `data_dir` cannot be written.
    """
    target = os.path.join(data_dir, NAME, VERSION)
    if not os.path.isdir(target):
        try:
            _write(target)
        except OSError as error:
            raise UserError(
                f"cannot write the digits to {target}: {error}; choose another place with --config.data.data_dir"
            ) from None


def _write(target: str) -> None:
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

    os.makedirs(os.path.dirname(target), exist_ok=True)
    staging = tempfile.mkdtemp(dir=os.path.dirname(target), prefix=f".{VERSION}.")
    try:
        identity = tfds.core.DatasetIdentity(
            name=NAME, version=tfds.core.Version(VERSION), data_dir=staging, module_name=__name__
        )
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=10),
            "id": tfds.features.Text(),
        }
        info = tfds.core.DatasetInfo(
            builder=identity,
            features=tfds.features.FeaturesDict(features),
            description=__doc__,
            supervised_keys=("image", "label"),
        )
        writer = tfds.core.SequentialWriter(info, max_examples_per_shard=len(images), file_format="array_record")
        writer.initialize_splits(["train", "test"])
        for split, indices in (("train", np.sort(train)), ("test", np.sort(test))):
            for i in indices:
                example = {"image": Image.fromarray(images[i]), "label": int(digits.target[i]), "id": f"digit_{i:04d}"}
                writer.add_examples({split: [example]})
        writer.close_all()
        try:
            os.rename(staging, target)
        except OSError:
            if not os.path.isdir(target):  # else another process was faster, and its copy is equal
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
