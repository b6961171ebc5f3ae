"""The data of a run: the configuration's fields become the arguments of splits, loaders and the augmentation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from vgg_jax.config import Config, DataConfig, numbers_of
from vgg_jax.data.augmentation import Augmentation, Batch, augment
from vgg_jax.data.dataset import Split, open_split
from vgg_jax.data.loader import Loader
from vgg_jax.data.mixing import Mixing, mix
from vgg_jax.data.resident import gathered
from vgg_jax.data.transforms import Views
from vgg_jax.training.losses import balanced_weights


def views(data: DataConfig) -> Views:
    """Return the test view and the training view of a configuration."""
    return Views(data.image_size, data.resize, data.train_view, data.train_scale, data.exif)


def augmentation(data: DataConfig) -> Augmentation:
    """Return the augmentation in the training step: without the crops of the host and the flips of the loader."""
    return Augmentation(
        mean=data.mean,
        std=data.std,
        pad=data.pad if data.train_view == "pad_crop" else 0,
        pad_mode=data.pad_mode,
        cutout=data.cutout,
        erasing=data.erasing,
        erasing_area=(data.erasing_area[0], data.erasing_area[1]),
        erasing_aspect=(data.erasing_aspect[0], data.erasing_aspect[1]),
        flip=data.flip and not data.alternating_flip,
        color_shift=data.color_shift,
        color_eigenvalues=data.color_eigenvalues,
        color_eigenvectors=data.color_eigenvectors,
    )


def training_view(config: Config) -> Callable[[jax.Array, Any], Batch]:
    """Return the function from (key, batch of a loader) to the images and labels of the training step."""
    options = augmentation(config.data)
    mixing = Mixing(config.model.num_classes, config.mixup, config.cutmix)

    def view(key: jax.Array, batch: Any) -> Batch:
        augmented = augment(key, gathered(batch), options)
        if not (mixing.mixup or mixing.cutmix):
            return augmented
        # A key of its own leaves all other random numbers unchanged.
        return mix(jax.random.fold_in(key, 5), augmented, mixing)

    return view


def class_weights(config: Config, split: Split) -> tuple[float, ...]:
    """Return the weights of the classes in the loss; () if all are equal.

    Args:
      config: the configuration of a run, with its number of classes.
      split: its training split, whose labels are read for balanced weights.
    """
    if config.class_weights == "balanced":
        return balanced_weights(split.labels, config.model.num_classes)
    return numbers_of(config.class_weights) or () if config.class_weights else ()


def open_splits(config: Config) -> tuple[Split, Split]:
    """Open the training split and the evaluation split of a configuration.

    Raises:
      UserError: as `open_split` and `Split.select`.
    """
    data = config.data
    train_split, eval_split = (
        open_split(
            *(data.dataset, split, views(data)),
            data_dir=data.data_dir,
            class_split=data.train_split,
            channels=1 if len(data.mean) == 1 else 3,
        )
        for split in (data.train_split, data.eval_split)
    )
    if config.loss == "sigmoid" and train_split.label_kind == "numbers":
        train_split, eval_split = (dataclasses.replace(s, label_kind="fractions") for s in (train_split, eval_split))
    return train_split.select(data.classes, data.images_per_class, config.seed), eval_split.select(data.classes)


def make_loader(split: Split, mesh: Mesh, data: DataConfig, training: bool = False) -> Loader:
    """Return the loader of a split of a configuration; this may read the whole split.

    Args:
      split: the split.
      mesh: the devices.
      data: the configuration.
      training: whether the loader gives the batches of training.

    Raises:
      UserError: if an example of a resident split cannot be read.
    """
    return Loader(
        split,
        mesh,
        num_threads=data.num_threads,
        skip_corrupt=data.corrupt_images == "skip",
        alternating_flip=data.alternating_flip,
        balanced=data.balanced and training,
    )
