"""The posteriors of a whole split under the paper's protocols."""

import collections
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import PIL.Image
from jaxtyping import Float, Shaped

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
    label_shape: tuple[int, ...]  # (): one class; (K,): zeros and ones for K classes, or K numbers

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
    outputs: str = "softmax",
    flip: bool = False,
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
      outputs: what the logits mean: softmax, sigmoid or values.
      flip: average the logits of `center_crop` over each image and its horizontal flip.

    Raises:
      UserError: if the network has too few classes, takes other channels, needs larger test scales, or its outputs do
        not fit the labels.
    """
    _check_outputs(model, outputs, split)
    train_scale, single, multi = scales
    _check_classes(model, split)
    if split.channels != len(preprocessing.mean):
        raise UserError(f"the network takes {len(preprocessing.mean)} channels; {split.name} has {split.channels}")
    parts = _parts(preprocessing.resize, single, multi)
    used = {scale for protocol in protocols if protocol != "center_crop" for _, scale in parts[protocol]}
    _check_scales(used, smallest_scale(model, preprocessing))
    views = _views(outputs, flip)
    part = functools.cache(
        functools.partial(split_posteriors, model, variables, preprocessing, split, batch_size, views)
    )

    def result(protocol: str) -> Result:
        computed = [part(view, scale) for view, scale in parts[protocol]]
        return Result(
            posteriors=fuse([posteriors for posteriors, _ in computed]).astype(np.float32),
            labels=computed[0][1],
            network=column(model),
            protocol=f"{protocol} with horizontal flip" if flip and protocol == "center_crop" else protocol,
            train_scale=train_scale,
            test_scales=tuple(dict.fromkeys(scale for _, scale in parts[protocol])),
            data=split.name,
            outputs=outputs,
        )

    return map(result, protocols)


def smallest_scale(model: VGG, preprocessing: Preprocessing) -> int:
    """Return the smallest test scale at which every protocol works: a crop fits, and the last map fills the head."""
    smallest: int = max(preprocessing.crop, model.pool_size * model.smallest_image())
    return smallest


def _parts(resize: int, single: int, multi: tuple[int, ...]) -> dict[str, list[tuple[str, int]]]:
    """Return the views and scales of each protocol, whose posteriors are averaged."""
    dense, crops = ([(view, scale) for scale in multi] for view in ("dense", "multi_crop"))
    return {
        "center_crop": [("center_crop", resize)],
        "dense": [("dense", single)],
        "multi_scale": dense,
        "multi_crop": crops,
        "dense+multi_crop": dense + crops,
    }


def _check_scales(used: set[int], smallest: int) -> None:
    if min(used, default=smallest) < smallest:
        scales = tuple(sorted(used))
        raise UserError(f"the test scales are {scales}; expected {smallest} or more; set them with --scales")


def _views(outputs: str, flip: bool) -> dict[str, Any]:
    """Return VIEWS for outputs of one meaning; with `flip`, center_crop averages over the horizontal flip."""
    views: dict[str, Any] = {name: functools.partial(view, outputs=outputs) for name, view in VIEWS.items()}
    if flip:
        views["center_crop"] = functools.partial(views["center_crop"], flip=True)
    return views


def _check_classes(model: VGG, split: LabeledImages) -> None:
    """Raise UserError if the network has no output for some of the classes."""
    if model.num_classes is None or split.num_classes > model.num_classes:
        raise UserError(
            f"the network has {model.num_classes or 'no'} outputs and {split.name} {split.num_classes} classes; "
            "expected an output for each class: choose a data set of the network's classes, or use predict"
        )


def _check_outputs(model: VGG, outputs: str, split: LabeledImages) -> None:
    """Raise UserError if the outputs of a network cannot be compared with the labels of a split."""
    several = "several labels or numbers for each image"
    if outputs == "softmax" and model.num_classes == 1:
        raise UserError(
            "the network has one output, whose softmax is always 1; expected a probability or a number: pass --outputs "
            "sigmoid or --outputs values"
        )
    if split.label_shape and outputs == "softmax":
        raise UserError(
            f"the network's outputs are softmax, and {split.name} has {several}; expected one class for each"
        )
    if split.label_shape and split.num_classes != model.num_classes:
        raise UserError(f"the network has {model.num_classes or 'no'} outputs; expected {split.num_classes}")
    if not split.label_shape and outputs == "values":
        raise UserError(f"the network's outputs are values, and {split.name} has classes; expected {several}")


def split_posteriors(
    model: VGG,
    variables: Mapping[str, Any],
    preprocessing: Preprocessing,
    split: LabeledImages,
    batch_size: int,
    views: Mapping[str, Any],
    view: str,
    scale: int,
) -> tuple[Float[np.ndarray, "n classes"], Shaped[np.ndarray, "n *k"]]:
    """Return the posteriors and the labels of a split at one scale.

    Args:
      model: a network with classes.
      variables: its variables.
      preprocessing: the preprocessing of its images.
      split: the images.
      batch_size: the number of images of one size that are evaluated together.
      views: the functions of the views, as VIEWS.
      view: center_crop, dense or multi_crop.
      scale: the short side to resize the images to. center_crop has the scale of the preprocessing.

    Returns:
      (N, num_classes) float32, and (N,) int32 or (N, K) float32.

    Raises:
      UserError: if an image cannot be read.
    """
    posteriors = np.zeros((len(split), model.num_classes or 0), np.float32)
    labels = np.zeros((len(split), *split.label_shape), np.float32 if split.label_shape else np.int32)
    function = jax.jit(functools.partial(views[view], model))
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
