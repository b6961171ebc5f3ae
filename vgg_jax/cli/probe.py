"""Train a linear classifier on extracted features, as in appendix B of the paper.

    python -m vgg_jax probe TRAIN TEST [--layer LAYER] [--classifier svm|logistic] [...]

TRAIN and TEST are files of `vgg-jax extract`, of two splits of any data set with one class for each image. The features
are divided by their L2 norms. C, the inverse strength of the regularization, is chosen on a fifth of the training
images; then the classifier is trained on all of them. Prints the accuracy on the test images and its 95 % interval.
"""

import argparse
import json
from collections.abc import Sequence

from vgg_jax.cli.paragraphs import Paragraphs
from vgg_jax.console import note
from vgg_jax.errors import report_mistakes, require
from vgg_jax.evaluation.embedding_files import Embeddings, load_embeddings
from vgg_jax.evaluation.linear_probe import CLASSIFIERS, STRENGTHS, Probe, probe_files
from vgg_jax.runtime import silence_libraries


def as_json(probe: Probe) -> str:
    """Return the result as one JSON object."""
    return json.dumps(
        {
            "accuracy": probe.accuracy,
            "interval": probe.interval,
            "correct": probe.correct,
            "total": probe.total,
            "C": probe.strength,
            "held_out": {f"{strength:g}": accuracy for strength, accuracy in probe.held_out.items()},
            "per_class": [None if accuracy != accuracy else accuracy for accuracy in probe.per_class],
        }
    )


def as_text(probe: Probe, test: Embeddings, per_class: bool) -> str:
    """Return the lines that state the result."""
    low, high = probe.interval
    lines = [f"accuracy {probe.accuracy:.2%}  95 % interval {low:.2%} to {high:.2%}  {probe.total:,} images"]
    lines.append(f"C {probe.strength:g}")
    if per_class:
        names = test.class_names or tuple(map(str, range(len(probe.per_class))))
        lines += [f"  {accuracy:7.2%}  {name}" for name, accuracy in zip(names, probe.per_class, strict=True)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="vgg-jax probe", description=__doc__, formatter_class=Paragraphs)
    parser.add_argument("train", metavar="TRAIN", help="features of the training images")
    parser.add_argument("test", metavar="TEST", help="features of the test images")
    parser.add_argument("--layer", help="the layer (default: the only one of the files)")
    parser.add_argument(
        "--classifier",
        choices=CLASSIFIERS,
        default="svm",
        help="linear SVM, or logistic regression (default: %(default)s)",
    )
    parser.add_argument(
        "--C",
        dest="strengths",
        type=float,
        nargs="+",
        default=STRENGTHS,
        help="candidates (default: 0.1 1 10 100 1000)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the held-out images (default: %(default)s)")
    parser.add_argument("--per-class", action="store_true", help="print the accuracy of each class")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    silence_libraries()

    def run() -> int:
        require("sklearn", "extract")
        train, test = load_embeddings(options.train), load_embeddings(options.test)
        probe = probe_files(
            *(train, test, options.layer, options.classifier, options.strengths, options.seed), report=note
        )
        print(as_json(probe) if options.json else as_text(probe, test, options.per_class))
        return 0

    return report_mistakes("probe", run)
