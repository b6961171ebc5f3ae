"""The configuration's fields become the arguments of splits, loaders and the augmentation."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from vgg_jax.config import Config, DataConfig
from vgg_jax.data.dataset import open_split
from vgg_jax.data.sampler import alternating_flips
from vgg_jax.data.transforms import TRAIN_VIEWS
from vgg_jax.training import inputs


def digits(data_dir, **fields):
    return DataConfig(dataset="digits", data_dir=data_dir, mean=(0.3,), std=(0.3,), **fields)


def ids(split):
    return [split.records[i]["id"] for i in range(len(split))]


def test_open_splits_selects_the_classes_and_images(data_dir):
    config = Config(data=digits(data_dir, classes=(5, 7), images_per_class=4), seed=3)
    train_split, eval_split = inputs.open_splits(config)
    whole_train, whole_eval = (open_split("digits", name, data_dir=data_dir) for name in ("train", "test"))
    assert ids(train_split) == ids(whole_train.select((5, 7), 4, seed=3))
    assert len(train_split) == 8
    assert ids(eval_split) == ids(whole_eval.select((5, 7)))
    again, other = (inputs.open_splits(dataclasses.replace(config, seed=seed))[0] for seed in (3, 4))
    assert ids(again) == ids(train_split)
    assert ids(other) != ids(train_split)


def test_splits_have_the_views_of_the_configuration(data_dir):
    fields = dict(image_size=16, resize=20, train_view="scale_crop", train_scale=(18, 30), exif=False)
    for split in inputs.open_splits(Config(data=digits(data_dir, **fields))):
        assert vars(split.views) == fields


def test_loader_has_the_fields_of_the_configuration(data_dir):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    split, _ = inputs.open_splits(Config(data=digits(data_dir)))
    plain, flipped = (
        next(
            inputs.make_loader(split, mesh, digits(data_dir, alternating_flip=alternating)).train_batches(
                0, 50, range(1)
            )
        )
        for alternating in (False, True)
    )
    flips = alternating_flips(0, 0, 50, 1437)[:, None, None, None]
    image = np.asarray(plain["image"])
    np.testing.assert_array_equal(flipped["image"], np.where(flips, image[:, :, ::-1], image))
    loader = inputs.make_loader(split, mesh, digits(data_dir, num_threads=3, corrupt_images="skip"))
    assert (loader._num_threads, loader._skip_corrupt) == (3, True)
    assert not inputs.make_loader(split, mesh, digits(data_dir))._skip_corrupt


@pytest.mark.parametrize("train_view", TRAIN_VIEWS)
def test_device_crops_only_the_view_pad_crop(train_view):
    assert inputs.augmentation(DataConfig(train_view=train_view, pad=3)).pad == (3 if train_view == "pad_crop" else 0)


def test_device_leaves_alternating_flips_to_the_loader():
    assert inputs.augmentation(DataConfig()).flip
    assert not inputs.augmentation(DataConfig(flip=False)).flip
    assert not inputs.augmentation(DataConfig(alternating_flip=True)).flip


def test_augmentation_has_the_constants_of_the_configuration():
    data = DataConfig(color_shift=0.1, pad_mode="reflect", cutout=8)
    augmentation = inputs.augmentation(data)
    for name in ("mean", "std", "pad_mode", "cutout", "color_shift", "color_eigenvalues", "color_eigenvectors"):
        assert getattr(augmentation, name) == getattr(data, name)
    defaults = inputs.Augmentation(mean=(0.0,), std=(1.0,))
    assert defaults.color_eigenvalues == data.color_eigenvalues
    assert defaults.color_eigenvectors == data.color_eigenvectors
