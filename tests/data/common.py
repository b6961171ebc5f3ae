"""Splits, meshes and batches that the tests of the data share."""

import functools

import jax
import numpy as np
import PIL.Image
from jax.sharding import Mesh

from tests.conftest import photographs, write_tfds
from tests.data.archives import encoded
from vgg_jax.data.dataset import open_split
from vgg_jax.data.transforms import Views

DIGIT_VIEWS = Views()
PHOTOGRAPH_VIEWS = Views(image_size=224, resize=256)
RANDOM_CROPS = Views(image_size=224, resize=256, train_view="random_resized_crop")
CORRUPT = (3, 8)  # positions of the corrupt images in `odd_files`
jpeg = functools.partial(encoded, quality=95)


def mesh(devices=1):
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


def open_digits(data_dir, split="train", views=DIGIT_VIEWS):
    return open_split("digits", split, views, data_dir=data_dir)


def open_cifar10(data_dir, split="train"):
    return open_split("cifar10", split, data_dir=str(data_dir))


def open_photographs(data_dir, split="train", views=PHOTOGRAPH_VIEWS):
    return open_split("imagenet2012", split, views, data_dir=str(data_dir))


def to_numpy(batches):
    return [{key: np.asarray(array) for key, array in batch.items()} for batch in batches]


def assert_equal_batches(a, b):
    assert len(a) == len(b) > 0
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])


def write_photographs(data_dir, files, validation=5):
    """Write an `imagenet2012` of these files; the first files are also the validation split."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=1000),
        "file_name": tfds.features.Text(),
    }
    examples = [{"image": file, "label": 80 * i % 1000, "file_name": f"{i}.JPEG"} for i, file in enumerate(files)]
    splits = {"train": examples, "validation": examples[:validation]}
    write_tfds(str(data_dir), "imagenet2012", "5.1.0", features, splits)


def odd_files():
    """Return twelve files: seven of unusual but readable images, then good JPEGs; those at `CORRUPT` are corrupt."""
    photos = photographs(12)
    gray = np.asarray(photos[4].convert("L"))
    files = [
        encoded(photos[0].convert("CMYK")),
        encoded(photos[1], "PNG"),
        encoded(photos[2].convert("LA"), "PNG"),
        jpeg(photos[3])[:2000],
        encoded(PIL.Image.fromarray(gray.astype(np.uint16) * 257), "PNG"),
        encoded(photos[5].convert("L")),
        encoded(photos[6].convert("RGBA"), "PNG"),
        *map(jpeg, photos[7:]),
    ]
    files[8] = b""
    return files
