"""Splits of data sets on disk: their examples, their views, and errors that name the damaged record."""

import dataclasses

import numpy as np
import pytest

from tests.conftest import raises_user_error, write_cifar10
from tests.data.common import (
    CORRUPT,
    PHOTOGRAPH_VIEWS,
    mesh,
    odd_files,
    open_cifar10,
    open_digits,
    open_photographs,
    to_numpy,
    write_photographs,
)
from vgg_jax.data.dataset import open_split
from vgg_jax.data.loader import Loader


def test_cifar10_as_tfds_writes_it(tmp_path):
    write_cifar10(str(tmp_path), num_train=20, num_test=10)
    split = open_cifar10(tmp_path)
    assert (len(split), split.num_classes, split.channels) == (20, 10, 3)
    image, label = split.test_view(3)
    assert (image.shape, image.dtype, label) == ((32, 32, 3), np.uint8, 3)


def test_select_keeps_the_classes_and_draws_by_the_seed(data_dir):
    train, test = (open_digits(data_dir, name) for name in ("train", "test"))
    labels = np.array([train.test_view(i)[1] for i in range(len(train))])
    selected = train.select((5, 7), 4, seed=3)
    assert sorted(label for _, label in map(selected.test_view, range(len(selected)))) == [5] * 4 + [7] * 4
    chosen = [selected.records[i]["id"] for i in range(8)]
    all_ids = [record["id"] for record in train.records]
    assert set(chosen) < {all_ids[i] for i in np.flatnonzero(np.isin(labels, (5, 7)))}
    selected_test = test.select((5, 7))
    assert [selected_test.records[i]["id"] for i in range(len(selected_test))] == [
        record["id"] for record in test.records if record["label"] in (5, 7)
    ]
    # The draw depends on the seed alone.
    again, other = (train.select((5, 7), 4, seed=seed) for seed in (3, 4))
    assert [again.records[i]["id"] for i in range(8)] == chosen
    assert [other.records[i]["id"] for i in range(8)] != chosen


@pytest.mark.parametrize("train_view", ["pad_crop", "random_resized_crop"])
def test_odd_images_become_rgb_and_corrupt_ones_are_named(tmp_path, train_view):
    write_photographs(tmp_path, odd_files())
    split = open_photographs(tmp_path, views=dataclasses.replace(PHOTOGRAPH_VIEWS, train_view=train_view))
    view = split.test_view if train_view == "pad_crop" else lambda i: split.random_view(i, 0, i)
    for i in range(len(split)):
        if i in CORRUPT:
            with raises_user_error(f"imagenet2012/train, example {i} ({i}.JPEG)", f"record {i}", "cannot be decoded"):
                view(i)
        else:
            image, label = view(i)
            assert (image.shape, image.dtype, label) == ((224, 224, 3), np.uint8, 80 * i)
            assert image.std() > 10  # a photograph, not a blank image
    loader = Loader(split, mesh(), resident=False)
    with raises_user_error("(3.JPEG)", "replace it, or skip such images with --config.data.corrupt_images=skip"):
        to_numpy(loader.eval_batches(12))


@pytest.mark.parametrize("damage", ["cut short", "empty", "a byte flipped", "missing"])
def test_damaged_file_is_named_with_the_record(tmp_path, damage):
    write_cifar10(str(tmp_path), num_train=40, num_test=10)
    (path,) = (tmp_path / "cifar10" / "3.0.2").glob("*train.array_record*")
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        flipped = data[:20_000] + bytes([data[20_000] ^ 1]) + data[20_001:]
        path.write_bytes({"cut short": data[: len(data) // 2], "empty": b"", "a byte flipped": flipped}[damage])
    split = open_cifar10(tmp_path)
    with raises_user_error(f"{path}, record ", "cannot be read, the file is damaged", "prepare the data set again"):
        Loader(split, mesh())
    with raises_user_error(f"{path}, record "):
        to_numpy(Loader(split, mesh(), resident=False).train_batches(0, 8, range(5)))


def test_unknown_and_unprepared_data_sets_are_named(tmp_path):
    with raises_user_error("'cifar11'", str(tmp_path)):
        open_split("cifar11", "train", data_dir=str(tmp_path))
    with raises_user_error("imagenette", str(tmp_path), "python -m vgg_jax prepare imagenette --data-dir"):
        open_split("imagenette", "train", data_dir=str(tmp_path))


def test_missing_split_lists_the_existing_splits(data_dir):
    with raises_user_error("'validation'", "train (1437), test (360)"):
        open_digits(data_dir, "validation")


def test_labels_out_of_range_are_found(data_dir):
    split = dataclasses.replace(open_digits(data_dir, "test"), num_classes=9)
    with raises_user_error("digits/test, example", "record ", "label 9; expected 0 to 8"):
        Loader(split, mesh())
    with raises_user_error("digits/test, example", "label 9; expected 0 to 8"):
        to_numpy(Loader(split, mesh(), resident=False).train_batches(0, 100, range(4)))


def test_part_of_a_split(data_dir):
    whole, first, rest = (open_digits(data_dir, f"train{part}") for part in ("", "[:90%]", "[90%:]"))
    assert len(first) + len(rest) == len(whole)
    assert rest.records.locate(5).endswith(f"record {len(first) + 5}")
    np.testing.assert_array_equal(rest.test_view(5)[0], whole.test_view(len(first) + 5)[0])
    for part in ("train[:0]", "train[90%:10%]", "train[x]"):
        with raises_user_error(f"split '{part}' of digits/1.0.0 is missing or empty"):
            open_digits(data_dir, part)
