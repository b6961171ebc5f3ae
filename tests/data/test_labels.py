"""Labels of TFDS's features: several classes, and numbers."""

import dataclasses

import numpy as np
import PIL.Image
import pytest

from tests.conftest import raises_user_error, write_tfds
from tests.data.common import mesh, to_numpy
from vgg_jax.data.dataset import open_split
from vgg_jax.data.labels import read_label
from vgg_jax.data.loader import Loader


def write_labels(data_dir, feature, labels):
    import tensorflow_datasets as tfds

    image = PIL.Image.new("RGB", (32, 32))
    features = {"image": tfds.features.Image(shape=(32, 32, 3), encoding_format="png"), "label": feature}
    write_tfds(str(data_dir), "labeled", "1.0.0", features, {"train": [{"image": image, "label": x} for x in labels]})
    return open_split("labeled", "train", data_dir=str(data_dir))


def several_classes():
    import tensorflow_datasets as tfds

    return tfds.features.Sequence(tfds.features.ClassLabel(names=["a", "b", "c"]))


def tensor(*shape, dtype=np.float32):
    import tensorflow_datasets as tfds

    return tfds.features.Tensor(shape=shape, dtype=dtype)


@pytest.mark.parametrize(
    ("feature", "labels", "expected"),
    [
        (several_classes, [[0, 2], [], [1]], [[1, 0, 1], [0, 0, 0], [0, 1, 0]]),
        (lambda: tensor(2), [[0.5, -1.0], [2.0, 3.0]], [[0.5, -1.0], [2.0, 3.0]]),
        (tensor, [0.5, 2.0], [[0.5], [2.0]]),
        (lambda: tensor(dtype=np.int64), [3, 70], [[3.0], [70.0]]),
        (lambda: tensor(2, dtype=np.bool_), [[True, False]] * 2, [[1.0, 0.0]] * 2),
    ],
    ids=["several", "numbers", "scalar", "integers", "booleans"],
)
@pytest.mark.parametrize("resident", [True, False])
def test_labels_reach_the_batches_as_rows_of_floats(feature, labels, expected, resident, tmp_path):
    split = write_labels(tmp_path, feature(), labels)
    assert split.label_shape == (split.num_classes,) == np.shape(expected)[1:]
    loader = Loader(split, mesh(2), resident=resident, num_threads=0)
    batches = to_numpy(loader.eval_batches(2))
    rows = np.concatenate([batch["label"][batch["weight"] > 0] for batch in batches])
    np.testing.assert_array_equal(rows, np.asarray(expected, np.float32))
    (training,) = to_numpy(loader.train_batches(0, 2, range(1)))
    assert {row.tobytes() for row in training["label"]} <= {row.tobytes() for row in rows}
    shapes = loader.eval_shapes(2)
    for name, array in batches[-1].items():  # the last one is filled up
        assert (shapes[name].shape, shapes[name].dtype) == (array.shape, array.dtype)


def test_corrupt_image_has_a_label_of_the_same_shape(tmp_path):
    import tensorflow_datasets as tfds

    image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
    examples = [{"image": PIL.Image.new("RGB", (32, 32)), "label": [1.0, 2.0]}] * 2
    features = {"image": image, "label": tensor(2)}
    write_tfds(str(tmp_path), "labeled", "1.0.0", features, {"train": examples})
    split = open_split("labeled", "train", data_dir=str(tmp_path))

    class Damaged:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {**split.records[index], **({"image": b""} if index else {})}

        locate = split.records.locate

    damaged = dataclasses.replace(split, records=Damaged())
    (batch,) = to_numpy(Loader(damaged, mesh(), num_threads=0, skip_corrupt=True).eval_batches(2))
    assert batch["label"].tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert batch["weight"].tolist() == [1.0, 0.0]


def test_number_that_is_not_finite_is_named(tmp_path):
    split = write_labels(tmp_path, tensor(2), [[0.0, 1.0], [0.0, float("nan")]])
    split.test_view(0)
    with raises_user_error("labeled/train, example 1, ", "record 1: label nan; expected finite numbers; correct"):
        split.test_view(1)


@pytest.mark.parametrize(
    ("kind", "found", "line"),
    [
        ("classes", [0, 3], "label 3; expected 0 to 2"),
        ("classes", [-1], "label -1; expected 0 to 2"),
        ("numbers", [0, np.inf, 0], "label inf; expected finite numbers"),
        ("numbers", [0, 1e300, 0], "label 1e+300; expected finite numbers"),
        ("fractions", [0, 1, 1.5], "label 1.5; expected numbers from 0 to 1, because config.loss is sigmoid"),
    ],
)
def test_label_that_cannot_be_is_refused(kind, found, line):
    with raises_user_error(line):
        read_label(kind, found, 3)


def test_feature_that_is_no_label_is_refused(tmp_path):
    import tensorflow_datasets as tfds

    with raises_user_error("labeled/1.0.0 has image, label; expected `image` and `label`: one of several classes"):
        write_labels(tmp_path, tfds.features.Text(), ["cat"])
