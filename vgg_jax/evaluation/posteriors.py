"""The posteriors of a whole split under the paper's protocols."""

import collections
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array, Float, UInt8

from vgg_jax.data.image_files import scaled_size
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.errors import UserError
from vgg_jax.evaluation.batches import Part, Tile, add_posteriors, batch_sizes, local_mesh, replicated
from vgg_jax.evaluation.buckets import Size, choose_buckets, fitting_bucket
from vgg_jax.evaluation.optimized import optimized_on_cpu
from vgg_jax.evaluation.protocols import GRID, center_posteriors, crop_corners, dense_posteriors, flip_posteriors
from vgg_jax.evaluation.reading import LabeledImages, Reader
from vgg_jax.evaluation.results import Result, column, fuse
from vgg_jax.model import VGG
from vgg_jax.runtime import compiler_options, return_freed_memory

Scales = tuple[str, int, tuple[int, ...]]  # S, Q of single-scale evaluation, Qs of multi-scale evaluation


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
    skip_corrupt: bool = False,
) -> Iterator[Result]:
    """Check the network against the split, then return an iterator over the results of the protocols.

    The first result takes the time of all: each image is decoded once for all protocols. Protocols share the posteriors
    of the same view at the same scale, so each is computed once.

    Args:
      model: a network with classes.
      variables: its variables.
      preprocessing: the preprocessing of its images.
      split: the images.
      protocols: names from PROTOCOLS, in the order of the results.
      scales: the training scale S, the test scale Q of `dense`, and those of the other protocols.
      batch_size: the number of images of the network's input size that each device evaluates together. Larger images
        count in proportion to their pixels, and horizontal flips count too.
      outputs: what the logits mean: softmax, sigmoid or values.
      flip: average the logits of `center_crop` over each image and its horizontal flip.
      skip_corrupt: leave out images that cannot be decoded; otherwise they raise UserError during iteration.

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
    reader = Reader(split, skip_corrupt)
    needed = list(dict.fromkeys(part for protocol in protocols for part in parts[protocol]))
    evaluation = _Evaluation(model, variables, preprocessing, reader, batch_size, outputs, flip, needed)

    def result(protocol: str) -> Result:
        computed = [evaluation.posteriors[part] for part in parts[protocol]]
        return Result(
            posteriors=fuse(computed)[reader.readable].astype(np.float32),
            labels=reader.labels[reader.readable],
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


def _parts(resize: int, single: int, multi: tuple[int, ...]) -> dict[str, list[Part]]:
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


class _Evaluation:
    """The posteriors of a split by several views at several scales, from which those of the protocols are averaged."""

    def __init__(
        self,
        model: VGG,
        variables: Mapping[str, Any],
        preprocessing: Preprocessing,
        reader: Reader,
        batch_size: int,
        outputs: str,
        flip: bool,
        parts: Sequence[Part],
    ) -> None:
        """Place the variables on the devices; the arguments are those of `evaluate_split`.

        Args:
          model: a network with classes.
          variables: its variables.
          preprocessing: the preprocessing of its images.
          reader: the images.
          batch_size: the number of images of the network's input size on one device.
          outputs: what the logits mean.
          flip: whether `center_crop` averages the logits over the horizontal flip.
          parts: the views, each with the short side to resize the images to. center_crop has the scale of the
            preprocessing.
        """
        self._preprocessing, self._reader, self._flip, self._parts = preprocessing, reader, flip, parts
        self._classes, self._pixels = model.num_classes or 0, batch_size * preprocessing.crop**2
        self._mesh = local_mesh(len(reader))
        shape = (batch_size, preprocessing.crop, preprocessing.crop, len(preprocessing.mean))
        model, variables = optimized_on_cpu(model, variables, shape, self._mesh.size)
        self._variables = replicated(variables, self._mesh)

        def center(variables: Any, images: jax.Array, sizes: jax.Array) -> jax.Array:
            return center_posteriors(model, variables, normalized(images, preprocessing), outputs, flip)

        def dense(variables: Any, images: jax.Array, sizes: jax.Array) -> jax.Array:
            return dense_posteriors(model, variables, normalized(images, preprocessing), outputs, sizes)

        def crops(variables: Any, images: jax.Array, sizes: jax.Array) -> jax.Array:
            return flip_posteriors(model, variables, normalized(images, preprocessing), outputs)

        # 16 images of 256x364 need 754 instead of 2,140 MiB of temporary memory with these options (VGG-16, dense).
        jit = functools.partial(jax.jit, compiler_options=compiler_options())
        self._functions = {"center_crop": jit(center), "dense": jit(dense), "multi_crop": jit(crops)}

    @functools.cached_property
    def posteriors(self) -> dict[Part, Float[np.ndarray, "n classes"]]:
        """Return the posteriors of each part, (N, num_classes) float32; zeros for corrupt images that are skipped.

        Raises:
          UserError: if an image cannot be read.
        """
        posteriors = {part: np.zeros((len(self._reader), self._classes), np.float32) for part in self._parts}
        views = dict.fromkeys(view for view, _ in self._parts)
        sizes = {view: self._dense_batches() if view == "dense" else self._crop_batches(view) for view in views}
        tiles = (tile for _, found in self._reader.views(self._tiles, "evaluation") for tile in found)
        add_posteriors(posteriors, self._functions, self._variables, tiles, sizes, self._mesh)
        return_freed_memory()
        return posteriors

    def _tiles(self, index: int, image: PIL.Image.Image) -> list[Tile]:
        """Return the tiles of an image for all parts. It is resized once to each scale."""
        prepare = self._preprocessing
        resized = functools.cache(functools.partial(prepare.resized, image))
        tiles = []
        for part in self._parts:
            view, scale = part
            if view == "multi_crop":
                crops = distinct_crops(resized(scale), prepare.crop)
                tiles += [Tile(part, index, pixels, weight) for pixels, weight in crops]
            else:
                tiles.append(Tile(part, index, prepare.view(image) if view == "center_crop" else resized(scale)))
        return tiles

    def _scales(self, view: str) -> list[int]:
        return [scale for other, scale in self._parts if other == view]

    def _crop_batches(self, view: str) -> dict[Size, int]:
        """Return the batch size of crops: as large at every scale, so that they share one compiled program."""
        side = self._preprocessing.crop
        count = len(self._reader) * len(self._scales(view)) * (GRID**2 if view == "multi_crop" else 1)
        return self._batches({(side, side): count}, view == "multi_crop" or self._flip)

    def _dense_batches(self) -> dict[Size, int]:
        """Return the buckets of all dense scales and their batch sizes; reads each image once for its size."""
        images = list(self._reader.sizes("sizes of the images"))
        sizes = [scaled_size(size, scale) for scale in self._scales("dense") for size in images]
        buckets = choose_buckets(sizes)
        counts = collections.Counter(fitting_bucket(buckets, size) for size in sizes)
        return self._batches({bucket: counts[bucket] for bucket in buckets if counts[bucket]}, flips=True)

    def _batches(self, counts: Mapping[Size, int], flips: bool) -> dict[Size, int]:
        return batch_sizes(counts, self._pixels // (2 if flips else 1), self._mesh.size)


def normalized(images: UInt8[Array, "n h w c"], preprocessing: Preprocessing) -> Float[Array, "n h w c"]:
    """Return images as `preprocessing` normalizes them, in float32, on the devices."""
    mean, std = (jnp.array(values, jnp.float32) for values in (preprocessing.mean, preprocessing.std))
    return (images.astype(jnp.float32) / 255 - mean) / std


def distinct_crops(
    image: UInt8[np.ndarray, "h w c"], size: int
) -> list[tuple[UInt8[np.ndarray, "{size} {size} c"], float]]:
    """Return the different ones of the 25 crops of `crop_corners`, each with its share of the 25.

    Crops coincide if the image is hardly larger than a crop: of the short side 224 there are five crops of 224.
    """
    corners = collections.Counter(crop_corners(image.shape[0], image.shape[1], size))
    shares = {corner: count / corners.total() for corner, count in corners.items()}
    return [(image[top : top + size, left : left + size], share) for (top, left), share in shares.items()]
