"""scikit-learn's digits as a data set on disk."""

import io
import sys

import numpy as np
import PIL.Image

from tests.conftest import raises_user_error
from tests.data.archives import records
from tests.data.common import open_digits
from vgg_jax.data.prepare import digits


def test_digits_are_scikit_learns_split_in_two(data_dir):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    seen = {}
    for split, size in (("train", 1437), ("test", 360)):
        examples = open_digits(data_dir, split).records
        assert len(examples) == size
        for record in examples:
            index = int(record["id"].decode().removeprefix("digit_"))
            assert index not in seen
            seen[index] = split
            if index % 100 == 0:
                image = np.asarray(PIL.Image.open(io.BytesIO(record["image"])))
                np.testing.assert_array_equal(image, np.round(bunch.images[index] * 255 / 16))
                assert record["label"] == bunch.target[index]
    assert len(seen) == 1797
    test = [i for i, split in seen.items() if split == "test"]
    share = np.bincount(bunch.target[test]) / np.bincount(bunch.target)
    np.testing.assert_allclose(share, 360 / 1797, atol=0.003)  # stratified: within half an image of 180
    # The split is fixed: these are its first images on every machine.
    assert sorted(test)[:8] == [21, 24, 28, 34, 35, 37, 39, 42]


def test_prepared_digits_need_no_scikit_learn(data_dir, monkeypatch, tmp_path):
    for name in ("sklearn", "sklearn.datasets", "sklearn.model_selection"):
        monkeypatch.setitem(sys.modules, name, None)
    assert len(open_digits(data_dir, "test")) == 360
    with raises_user_error("scikit-learn", "pip install 'vgg_jax[digits]'", str(tmp_path)):
        open_digits(str(tmp_path), "test")


def test_relative_paths_and_names_in_the_working_directory(tmp_path, monkeypatch):
    """`digits` is the data set, even if there is a directory of that name."""
    monkeypatch.chdir(tmp_path)
    for data_dir in (".", "./x", "y//z"):
        digits.prepare(data_dir)
        assert len(records(data_dir, "digits", "test")) == digits.NUM_TEST
        assert len(records(data_dir, "digits", "train")) == 1437
