"""Evaluates by the paper's protocols: python -m vgg_jax.evaluate (--workdir RUN | --weights FILE|NAME) [...]

  centre_crop        one crop; the network as it is trained. Not a protocol of the paper
  dense              Table 3: the whole image at one scale, and its mirror image
  multi_scale        Table 4: the same at three scales
  multi_crop         Table 5: 5x5 crops and their mirror images at three scales: 150
  dense+multi_crop   Table 5: the mean of multi_scale's and multi_crop's posteriors
  all                all of these

Prints top-1 and top-5 error, on ImageNet with the paper's figure beside it. The posteriors are saved, as PROTOCOL.npz
in the run's directory or --output, and `--fuse FILE FILE ...` averages those of several networks, without another pass.
"""

import argparse
import collections
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from vgg_jax import paper
from vgg_jax.allocator import keep_freed_memory
from vgg_jax.config import DataConfig
from vgg_jax.data.sources import Split, open_split
from vgg_jax.errors import UserError, report_mistakes
from vgg_jax.evaluation import (
    centre_posteriors,
    confusion_matrix,
    crop_posteriors,
    dense_posteriors,
    fuse,
    grid_crops,
    top_k_error,
)
from vgg_jax.model import VGG
from vgg_jax.preprocess import Preprocessing
from vgg_jax.pretrained import load_for_images
from vgg_jax.reporting import progress, say
from vgg_jax.run_directory import read_config

PROTOCOLS = ("centre_crop", "dense", "multi_scale", "multi_crop", "dense+multi_crop")


@dataclasses.dataclass
class Result:
    """What one evaluation gives, as it is saved."""

    posteriors: np.ndarray  # (N, num_classes) float32
    labels: np.ndarray  # (N,) int32
    network: str  # the paper's column, with what differs from it
    protocol: str
    train_scale: str  # the paper's S: "256", or "256-512"
    test_scales: tuple[int, ...]  # the paper's Q
    data: str  # dataset/split

    def save(self, path: str) -> None:
        """Writes an .npz file, whole or not at all."""
        description = {name: value for name, value in vars(self).items() if not isinstance(value, np.ndarray)}
        try:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            with open(path + ".partial", "wb") as file:
                text = np.array(json.dumps(description))
                np.savez(file, posteriors=self.posteriors, labels=self.labels, description=text)
            os.replace(path + ".partial", path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error}; choose another place with --output") from None

    @classmethod
    def load(cls, path: str) -> "Result":
        """Reads what `save` wrote."""
        try:
            with np.load(path, allow_pickle=False) as file:
                description = json.loads(str(file["description"]))
                description["test_scales"] = tuple(description["test_scales"])
                return cls(file["posteriors"], file["labels"], **description)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} holds no posteriors that vgg_jax.evaluate saved: {error}") from None


def posteriors(
    model: VGG, variables: Any, prepare: Preprocessing, split: Split, batch_size: int, view: str, scale: int
) -> tuple[np.ndarray, np.ndarray]:
    """The posteriors (N, num_classes) float32 and the labels (N,) of a split at one scale.

    Args:
      model: a network with classes.
      variables: its variables.
      prepare: what they want of an image.
      split: the images.
      batch_size: how many images of one size are evaluated together.
      view: centre_crop, dense or multi_crop.
      scale: the short side to resize the images to; centre_crop has its own.

    Raises:
      UserError: where an image cannot be read.
    """
    result = np.zeros((len(split), model.num_classes or 0), np.float32)
    labels = np.zeros(len(split), np.int32)
    views = {"centre_crop": centre_posteriors, "dense": dense_posteriors, "multi_crop": crop_posteriors}
    function = jax.jit(functools.partial(views[view], model))
    waiting: dict[tuple[int, ...], dict[int, np.ndarray]] = collections.defaultdict(dict)
    for i in progress(range(len(split)), f"{view}, {scale}", "images"):
        image, labels[i] = split.image(i)
        array = prepare(image) if view == "centre_crop" else prepare.uncropped(image, scale)
        if view == "multi_crop":
            result[i] = function(variables, grid_crops(array, prepare.crop))
            continue
        same = waiting[array.shape]
        same[i] = array
        if len(same) == batch_size:
            result[list(same)] = function(variables, np.stack(list(same.values())))
            same.clear()
    for same in waiting.values():  # one by one, or every number of them would be compiled for
        for i, array in same.items():
            result[i] = function(variables, array[None])[0]
    return result, labels


def column(model: VGG) -> str:
    """The paper's name of a network, and in words what it has that the paper's have not."""
    name = "A-LRN" if model.lrn else "C" if model.conv1x1 else {11: "A", 13: "B", 16: "D", 19: "E"}[model.depth]
    return name + (" with batch norm" if model.batch_norm else "")


def scales(data: DataConfig, resize: int) -> tuple[str, int, tuple[int, ...]]:
    """The training scale S, and the test scales Q of single-scale and of multi-scale evaluation, as in the paper."""
    if data.train_view == "scale_crop" and data.train_scale[0] < data.train_scale[1]:
        low, high = data.train_scale
        return f"{low}-{high}", (low + high) // 2, (low, (low + high) // 2, high)
    side = data.train_scale[0] if data.train_view == "scale_crop" else resize
    step = 32 if side >= 256 else max(side // 8, 1)  # the paper's; in proportion for small images
    return str(side), side, (side - step, side, side + step)


def table(results: Sequence[tuple[Result, str]]) -> str:
    """The errors in the layout of the paper's Tables 3 to 6; each result with the paper's figure, or ""."""
    rows = [("network", "train S", "test Q", "protocol", "top-1 error, %", "top-5 error, %", "paper, %")]
    for result, figure in results:
        errors = [100 * top_k_error(result.posteriors, result.labels, k) for k in (1, 5)]
        q = ", ".join(map(str, result.test_scales))
        rows.append(
            (result.network, result.train_scale, q, result.protocol, f"{errors[0]:.1f}", f"{errors[1]:.1f}", figure)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def published(result: Result) -> str:
    """The paper's figure for the same network, scales and protocol on all of ImageNet's validation images, or ""."""
    if result.data != "imagenet2012/validation" or result.posteriors.shape[1] != 1000:
        return ""
    single, multi = paper.TEST_SCALES.get(result.train_scale, (0, ()))
    if result.test_scales != ((single,) if result.protocol == "dense" else multi):
        return ""
    figures = {
        "dense": paper.SINGLE_SCALE,
        "multi_scale": paper.MULTI_SCALE,
        "multi_crop": paper.MULTI_CROP,
        "dense+multi_crop": paper.DENSE_AND_MULTI_CROP,
        "centre_crop": {},
    }[result.protocol]
    return figures.get((result.network, result.train_scale), "")


def fused(paths: Sequence[str]) -> tuple[Result, str]:
    """The mean of saved posteriors, and the paper's figure where it publishes that fusion.

    Raises:
      UserError: where they are not of the same images.
    """
    results = [Result.load(path) for path in paths]
    first = results[0]
    for path, result in zip(paths, results, strict=True):
        same = result.posteriors.shape == first.posteriors.shape and (result.labels == first.labels).all()
        if not same or result.data != first.data:
            raise UserError(f"{path} is of {result.data}, {result.posteriors.shape}; expected the images of {paths[0]}")
    protocols = " + ".join(dict.fromkeys(result.protocol for result in results))
    network = " + ".join(result.network for result in results)
    joined = dataclasses.replace(
        first, posteriors=fuse([result.posteriors for result in results]), network=network, protocol=protocols
    )
    jittered = {(result.network, result.train_scale) for result in results} == {("D", "256-512"), ("E", "256-512")}
    return joined, paper.FUSION.get(protocols, "") if all(map(published, results)) and jittered else ""


def evaluate_network(options: argparse.Namespace) -> list[tuple[Result, str]]:
    """Evaluates one network by the protocol asked for, and saves the posteriors.

    Raises:
      UserError: where the weights, the data or the scales cannot be used.
    """
    if options.workdir:
        data = read_config(options.workdir).data
        data = dataclasses.replace(data, dataset=options.dataset or data.dataset)
    else:
        data = DataConfig(options.dataset or "imagenet2012", eval_split="validation")
    data = dataclasses.replace(data, data_dir=options.data_dir or data.data_dir)
    split = open_split(data, options.split or data.eval_split).select(data.classes)
    source = options.workdir or options.weights
    model, variables, prepare = load_for_images(source)
    if model.num_classes is None or split.num_classes > model.num_classes:
        raise UserError(f"{source} has {model.num_classes or 'no'} classes; expected {split.num_classes} or more")
    if split.channels != len(prepare.mean):
        raise UserError(f"{source} takes {len(prepare.mean)} channels; {split.name} has {split.channels}")

    train_scale, single, multi = scales(data, prepare.resize)
    if options.scales:
        single, multi = options.scales[0], tuple(options.scales)
    smallest = max(prepare.crop, model.pool_size * 2 ** len(model.pool_after))
    if options.protocol != "centre_crop" and min(*multi, single) < smallest:
        raise UserError(f"the test scales are {multi}; expected {smallest} or more; set them with --scales")
    part = functools.cache(functools.partial(posteriors, model, variables, prepare, split, options.batch_size))
    dense, crops = ([(view, scale) for scale in multi] for view in ("dense", "multi_crop"))
    parts = {
        "centre_crop": [("centre_crop", prepare.resize)],
        "dense": [("dense", single)],
        "multi_scale": dense,
        "multi_crop": crops,
        "dense+multi_crop": dense + crops,
    }
    results = []
    for protocol in PROTOCOLS if options.protocol == "all" else (options.protocol,):
        computed = [part(view, scale) for view, scale in parts[protocol]]
        result = Result(
            posteriors=fuse([array for array, _ in computed]).astype(np.float32),
            labels=computed[0][1],
            network=column(model),
            protocol=protocol,
            train_scale=train_scale,
            test_scales=tuple(dict.fromkeys(scale for _, scale in parts[protocol])),
            data=split.name,
        )
        path = os.path.join(options.output or os.path.join(options.workdir or "", "posteriors"), f"{protocol}.npz")
        result.save(path)
        say(f"posteriors of {len(split):,} images: {path}")
        results.append((result, published(result)))
    return results


def draw_confusion(result: Result, path: str) -> None:
    """Draws which classes are taken for which, and the ten with the most errors, as a picture at `path`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    matrix = confusion_matrix(result.posteriors, result.labels)
    counts = matrix.sum(1)
    (present,) = np.nonzero(counts)
    errors = 1 - matrix.diagonal() / np.maximum(counts, 1)
    worst = present[np.argsort(-errors[present], kind="stable")][:10][::-1]  # the worst at the top
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    shown = left.imshow(matrix / np.maximum(counts, 1)[:, None], vmin=0, vmax=1, cmap="viridis")
    left.set(xlabel="predicted class", ylabel="true class", title=f"{result.network}, {result.protocol}")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(shown, ax=left, label="share of the true class")
    right.barh([str(i) for i in worst], 100 * errors[worst])
    right.set(xlabel="top-1 error, %", ylabel="class", title="the classes with the most errors", xlim=(0, 100))
    try:
        figure.savefig(path, dpi=100)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; choose another file with --confusion") from None


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m vgg_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="a run of train.py; its data set and scales are taken too")
    source.add_argument("--weights", help="a file of weights, or a name of load_pretrained")
    source.add_argument("--fuse", nargs="+", metavar="FILE", help="average saved posteriors instead")
    parser.add_argument("--protocol", choices=(*PROTOCOLS, "all"), default="centre_crop")
    parser.add_argument("--scales", type=int, nargs="+", help="the test scales Q, instead of the paper's for S")
    parser.add_argument("--dataset", help="as config.data.dataset; imagenet2012 for --weights")
    parser.add_argument("--split", help="the run's, or validation")
    parser.add_argument("--data-dir", help="TFDS's data directory")
    parser.add_argument("--batch-size", type=int, default=16, help="images of one size together (%(default)s)")
    parser.add_argument("--output", metavar="DIR", help="for the posteriors (posteriors, in the run's directory)")
    parser.add_argument("--confusion", metavar="PNG", help="draw the confusion matrix and the worst classes")
    options = parser.parse_args()
    keep_freed_memory()
    logging.set_verbosity(logging.ERROR)

    def command() -> int:
        if options.batch_size < 1:
            raise UserError(f"--batch-size is {options.batch_size}; expected 1 or more")
        results = [fused(options.fuse)] if options.fuse else evaluate_network(options)
        print(table(results))
        if options.confusion:
            draw_confusion(results[-1][0], options.confusion)
        return 0

    return report_mistakes("evaluate", command)


if __name__ == "__main__":
    sys.exit(main())
