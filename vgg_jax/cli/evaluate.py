"""Evaluate a network by the protocols of the paper.

    python -m vgg_jax evaluate (--workdir RUN | --weights FILE|NAME) [...]

  center_crop        one crop, as the run evaluates itself (config.flip_eval or --flip); not a protocol of the paper
  dense              Table 3: the whole image at one scale, and its horizontal flip
  multi_scale        Table 4: the same at three scales
  multi_crop         Table 5: 5x5 crops and their horizontal flips at three scales, 150 crops in all
  dense+multi_crop   Table 5: the mean of the posteriors of multi_scale and multi_crop
  all                all of these

Prints top-1 and top-5 error, on ImageNet with the figures of the paper; for several labels (sigmoid) the share of wrong
ones, for numbers (squared_error) the root mean squared error. Saves the posteriors as PROTOCOL.npz in the run's
directory or in --output. Classes are matched by name, if both the data and the network state names.
`--fuse FILE FILE ...` averages the saved posteriors of several networks without evaluating them again.
"""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from vgg_jax.cli.network_options import add_network_options, load_network
from vgg_jax.cli.paragraphs import Paragraphs
from vgg_jax.config import DataConfig
from vgg_jax.console import log, note
from vgg_jax.data.listing import shortened
from vgg_jax.errors import UserError, report_mistakes, require
from vgg_jax.evaluation.protocols import PROTOCOLS
from vgg_jax.evaluation.results import (
    Result,
    class_table,
    draw_confusion,
    fused,
    published_figure,
    scales,
    table,
    worst_classes,
)
from vgg_jax.network import Network
from vgg_jax.runtime import configure


def evaluate(options: argparse.Namespace) -> list[tuple[Result, str]]:
    """Evaluate one network by the requested protocols, and save the posteriors.

    Returns:
      The results, each with the paper's figure or "".

    Raises:
      UserError: if the weights, the data or the scales cannot be used.
    """
    # Imported here, because --fuse and --help need none of these, and the data set's libraries take seconds.
    from vgg_jax.evaluation.posteriors import evaluate_split, smallest_scale

    net = load_network(options.workdir or options.weights, options)
    net.check_has_classes()
    preprocessing = net.checked_preprocessing()
    data, split, flip, skip_corrupt = _open_data(options, net)
    split = split.decoded_for(preprocessing)
    train_scale, single, multi = scales(data, preprocessing.resize, smallest_scale(net.model, preprocessing))
    if options.scales:
        single, multi = options.scales[0], tuple(options.scales)
    if options.per_class and net.outputs == "values":
        raise UserError(f"{net.source} has values as outputs; expected classes for --per-class: leave it out")
    if options.confusion and split.label_shape:
        raise UserError(f"{split.name} has several labels for each image; expected one for --confusion: leave it out")
    protocols = PROTOCOLS if options.protocol == "all" else (options.protocol,)
    results = []
    evaluated = evaluate_split(
        *(net.model, net.variables, preprocessing, split, protocols),
        *((train_scale, single, multi), options.batch_size, net.outputs, flip, skip_corrupt),
    )
    for protocol, result in zip(protocols, evaluated, strict=True):
        result.classes = net.classes or split.class_names
        folder = options.output or os.path.join(options.workdir or "", "posteriors")
        path = os.path.join(folder, f"{protocol}.npz")
        result.save(path)
        log(f"posteriors of {len(result.labels):,} images: {path}")
        results.append((result, published_figure(result)))
    return results


def _open_data(options: argparse.Namespace, net: Network) -> tuple[DataConfig, Any, bool, bool]:
    """Return the data configuration of the run, changed by the options, and the split to evaluate.

    The two flags are --flip, by default the run's `flip_eval`, and whether the run skips corrupt images.

    The split has the labels of the network, if both the split and the network state their class names.

    Args:
      options: the options of the command.
      net: the network to evaluate.
    """
    from absl import logging

    from vgg_jax.data.dataset import open_split
    from vgg_jax.data.image_folder import has_only_split
    from vgg_jax.evaluation.matching import network_labels
    from vgg_jax.training.run_directory import read_config

    logging.set_verbosity(logging.ERROR)  # TFDS logs what this command reports
    flip = False
    if options.workdir:
        config = read_config(options.workdir)
        data, flip = config.data, config.flip_eval
        data = dataclasses.replace(data, dataset=options.dataset or data.dataset)
    else:
        data = DataConfig(options.dataset or "imagenet2012", eval_split="validation")
    data = dataclasses.replace(data, data_dir=options.data_dir or data.data_dir)
    name = options.split or data.eval_split
    # By name, a folder may have some of the classes. By number, those of the training split number them.
    alone = net.classes is None and has_only_split(data.dataset, name, data.train_split)
    class_split = data.train_split if net.classes is None and not alone else name
    split = open_split(data.dataset, name, data_dir=data.data_dir, class_split=class_split)
    if alone:
        _number_classes(split, net, data.train_split)
    if net.classes is not None and split.class_names:
        labels = network_labels(split.name, split.class_names, net.classes)
        if not split.label_shape:
            split = split.relabel(labels, net.classes)
        elif labels != tuple(range(len(labels))):
            raise UserError(
                f"{split.name} has the labels {shortened(split.class_names)}; expected {shortened(net.classes)}, in "
                "this order: several labels for each image are compared by number"
            )
    # More classes than outputs are refused later.
    elif not split.label_shape and split.num_classes < (net.model.num_classes or 0):
        stated = "the network" if net.classes is None else split.name
        note(
            f"{stated} states no class names, so labels are compared by number: {split.num_classes} classes of "
            f"{split.name}, {net.model.num_classes} outputs of the network"
        )
    flip = flip if options.flip is None else options.flip
    return data, split.select(data.classes), flip, data.corrupt_images == "skip"


def _number_classes(split: Any, net: Network, train_split: str) -> None:
    """Print that the split's own folders number the classes; raise UserError if their number is not the network's."""
    missing = f"there is no folder {train_split!r} beside {split.name}, whose class folders number the classes"
    if split.num_classes < (net.model.num_classes or 0):  # more classes than outputs are refused later
        raise UserError(
            f"{missing}, and {net.source} states no class names; found {split.num_classes} class folders; expected "
            f"{net.model.num_classes}: add --classes FILE with the names of the network's classes"
        )
    note(
        f"{missing}; those of {split.name} are numbered in the order of their names: "
        f"{shortened(split.class_names)}; add --classes FILE if the network's classes are in another order"
    )


def _check_fusion(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Raise UserError if options beside --fuse would have no effect."""
    used = ("fuse", "confusion", "per_class")
    unused = [
        action.option_strings[0]
        for action in parser._actions
        if action.dest not in used and getattr(options, action.dest, action.default) != action.default
    ]
    if unused:
        raise UserError(
            f"--fuse averages saved posteriors and loads no network; found {', '.join(unused)}; expected only "
            "--per-class or --confusion beside it: leave out the others, or evaluate the networks with them first"
        )


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Raise UserError if options do not fit each other."""
    if options.batch_size < 1:
        raise UserError(f"--batch-size is {options.batch_size}; expected 1 or more")
    if options.fuse:
        _check_fusion(parser, options)
    elif options.flip is not None and options.protocol not in ("center_crop", "all"):
        raise UserError(
            f"found --flip or --no-flip with --protocol {options.protocol}, which always has the horizontal flips; "
            "expected center_crop: leave it out"
        )
    if options.confusion:
        require("matplotlib", "train")  # now, because the evaluation before the drawing can take hours


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="vgg-jax evaluate", description=__doc__, formatter_class=Paragraphs)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--workdir", metavar="RUN", help="a run of train.py, whose data set and scales are the defaults"
    )
    source.add_argument("--weights", metavar="NET", help="a file of weights or a pretrained network's name")
    source.add_argument("--fuse", nargs="+", metavar="FILE", help="average saved posteriors instead")
    parser.add_argument(
        "--protocol",
        choices=(*PROTOCOLS, "all"),
        default="center_crop",
        metavar="PROTOCOL",
        help="one of those above (default: %(default)s)",
    )
    parser.add_argument("--scales", metavar="Q", type=int, nargs="+", help="test scales Q (default: the paper's for S)")
    parser.add_argument("--dataset", help="as config.data.dataset (default: the run's, or imagenet2012)")
    parser.add_argument("--split", help="split to evaluate (default: the run's, or validation)")
    parser.add_argument("--data-dir", help="TFDS's data directory (default: the run's, or $TFDS_DATA_DIR)")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=16,
        help="images of the network's input size that each device computes together; larger images count by their "
        "pixels, and horizontal flips count (default: %(default)s)",
    )
    help_flip = "average the logits of center_crop over the horizontal flip (default: as the run's config.flip_eval)"
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, help=help_flip)
    parser.add_argument("--output", metavar="DIR", help="folder of the posteriors (default: posteriors, in the run's)")
    parser.add_argument(
        "--per-class", action="store_true", help="print the accuracy of each class, by the last protocol"
    )
    parser.add_argument(
        "--confusion", metavar="PNG", help="draw the confusion matrix, and print the classes with the most errors"
    )
    add_network_options(parser)
    options = parser.parse_args(argv)
    configure()

    def run() -> int:
        _check_options(parser, options)
        results = [fused(options.fuse)] if options.fuse else evaluate(options)
        if options.confusion:
            print(worst_classes(results[-1][0]))
        print(table(results))
        if options.per_class:
            print(class_table(results[-1][0]))
        if options.confusion:
            draw_confusion(results[-1][0], options.confusion)
        return 0

    return report_mistakes("evaluate", run, f"lower --batch-size (now {options.batch_size}) or --scales")
