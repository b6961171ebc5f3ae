"""The posteriors of a whole split under the paper's protocols."""

import collections
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import PIL.Image
from jaxtyping import Float, Int

from vgg_jax.console import progress
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.errors import UserError
from vgg_jax.evaluation.protocols import center_posteriors, crop_posteriors, dense_posteriors, grid_crops
from vgg_jax.evaluation.results import Result, column, fuse
from vgg_jax.model import VGG

VIEWS = {"center_crop": center_posteriors, "dense": dense_posteriors, "multi_crop": crop_posteriors}
Scales = tuple[str, int, tuple[int, ...]]  # S, Q of single-scale evaluation, Qs of multi-scale evaluation


@runtime_checkable
class LabeledImages(Protocol):
    """What evaluation needs of a split: `data.dataset.Split` without its imports."""

    name: str  # dataset/split
    num_classes: int
    channels: int

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def image(self, index: int) -> tuple[PIL.Image.Image, Any]:
        """Return an image and its label."""
        ...


def evaluate_split(
    model: VGG,
    variables: Mapping[str, Any],
    preprocessing: Preprocessing,
    split: LabeledImages,
    protocols: Sequence[str],
    scales: Scales,
    batch_size: int,
) -> Iterator[Result]:
    """Check the network against the split, then return an iterator over the results of the protocols.

    Protocols share the posteriors of the same view at the same scale, so each is computed once.

    Args:
      model: a network with classes.
      variables: its variables.
      preprocessing: the preprocessing of its images.
      split: the images.
      protocols: names from PROTOCOLS, in the order of the results.
      scales: the training scale S, the test scale Q of `dense`, and those of the other protocols.
      batch_size: the number of images of one size that are evaluated together.

    Raises:
      UserError: if the network has too few classes, takes other channels, or needs larger test scales.
    """
    train_scale, single, multi = scales
    if model.num_classes is None or split.num_classes > model.num_classes:
        raise UserError(f"the network has {model.num_classes or 'no'} classes; expected {split.num_classes} or more")
    if split.channels != len(preprocessing.mean):
        raise UserError(f"the network takes {len(preprocessing.mean)} channels; {split.name} has {split.channels}")
    smallest = max(preprocessing.crop, model.pool_size * 2 ** len(model.pool_after))
    if set(protocols) != {"center_crop"} and min(*multi, single) < smallest:
        raise UserError(f"the test scales are {multi}; expected {smallest} or more; set them with --scales")
    dense, crops = ([(view, scale) for scale in multi] for view in ("dense", "multi_crop"))
    parts = {
        "center_crop": [("center_crop", preprocessing.resize)],
        "dense": [("dense", single)],
        "multi_scale": dense,
        "multi_crop": crops,
        "dense+multi_crop": dense + crops,
    }
    part = functools.cache(functools.partial(split_posteriors, model, variables, preprocessing, split, batch_size))

    def result(protocol: str) -> Result:
        computed = [part(view, scale) for view, scale in parts[protocol]]
        return Result(
            posteriors=fuse([posteriors for posteriors, _ in computed]).astype(np.float32),
            labels=computed[0][1],
            network=column(model),
            protocol=protocol,
            train_scale=train_scale,
            test_scales=tuple(dict.fromkeys(scale for _, scale in parts[protocol])),
            data=split.name,
        )

    return map(result, protocols)


def split_posteriors(
    model: VGG,
    variables: Mapping[str, Any],
    preprocessing: Preprocessing,
    split: LabeledImages,
    batch_size: int,
    view: str,
    scale: int,
) -> tuple[Float[np.ndarray, "n classes"], Int[np.ndarray, " n"]]:
    """Return the posteriors and the labels of a split at one scale.

    Args:
      model: a network with classes.
      variables: its variables.
      preprocessing: the preprocessing of its images.
      split: the images.
      batch_size: the number of images of one size that are evaluated together.
      view: center_crop, dense or multi_crop.
      scale: the short side to resize the images to. center_crop has the scale of the preprocessing.

    Returns:
      (N, num_classes) float32 and (N,) int32.

    Raises:
      UserError: if an image cannot be read.
    """
    posteriors = np.zeros((len(split), model.num_classes or 0), np.float32)
    labels = np.zeros(len(split), np.int32)
    function = jax.jit(functools.partial(VIEWS[view], model))
    waiting: dict[tuple[int, ...], dict[int, np.ndarray]] = collections.defaultdict(dict)
    for i in progress(range(len(split)), f"{view}, {scale}", "images"):
        image, labels[i] = split.image(i)
        array = preprocessing(image) if view == "center_crop" else preprocessing.uncropped(image, scale)
        if view == "multi_crop":
            posteriors[i] = function(variables, grid_crops(array, preprocessing.crop))
            continue
        same_size = waiting[array.shape]
        same_size[i] = array
        if len(same_size) == batch_size:
            posteriors[list(same_size)] = function(variables, np.stack(list(same_size.values())))
            same_size.clear()
    for same_size in waiting.values():  # one by one: a batch of each remaining size would be compiled anew
        for i, array in same_size.items():
            posteriors[i] = function(variables, array[None])[0]
    return posteriors, labels
