"""A linear probe of frozen ImageNet features, as in appendix B: python experiments/probe.py DATA --weights FILE [...]

DATA has train/CLASS/IMAGE and test/CLASS/IMAGE. FILE has the convolutional part of VGG-16. For each size Q the images
are resized to Q, the features after each layer are averaged over positions and over the horizontal flip, and a linear
SVM is trained on their L2-normalized form; its C is chosen on a fifth of the training images. A last row averages the
features over all sizes, as the paper does over scales.

Extracts each size once, for all layers, and resumes when it is started again: complete files of features and complete
rows of the table are kept in --runs-dir. Writes probe.json and probe.md to --out.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from experiments.cifar10_runs import data_folder
from experiments.environment import environment, table
from vgg_jax import AUTHORS, Network, load
from vgg_jax.data.dataset import open_split
from vgg_jax.evaluation.embedding_files import Embeddings, load_embeddings
from vgg_jax.evaluation.extraction import extract
from vgg_jax.evaluation.image_sources import SplitImages
from vgg_jax.evaluation.linear_probe import CLASSIFIERS, probe_files
from vgg_jax.evaluation.pooled_features import FeatureOptions
from vgg_jax.runtime import configure

LAYERS = ("pool3", "pool4", "pool5")
SIZES = (64, 128)
Files = dict[str, list[tuple[str, float]]]  # by split, the files of the features and the seconds of their extraction


def extracted(net: Network, options: argparse.Namespace, size: int, split: str) -> tuple[str, float]:
    """Return the file of the features of a split, and the seconds that the call took which completed it."""
    choices = FeatureOptions(LAYERS, scales=(size,), flip=options.flip)  # the probe divides by the norms
    images = open_split(os.path.join(options.data, ""), split, data_dir="")
    images = images.decoded_for(net.checked_preprocessing()).select((), options.per_class if split == "train" else 0)
    path = os.path.join(options.runs_dir, f"{split}-{size}-{variant(options)}.safetensors")
    start = time.perf_counter()
    source = SplitImages(images)
    found = extract(net.model, net.variables, net.checked_preprocessing(), source, choices, path)
    if found.computed or not os.path.exists(path + ".seconds"):  # killed after the file was complete
        with open(path + ".seconds", "w") as file:
            file.write(str(time.perf_counter() - start if found.computed else math.nan))
    with open(path + ".seconds") as file:
        return path, float(file.read())


def variant(options: argparse.Namespace) -> str:
    """Return the part of file names that states the options."""
    return f"{options.per_class or 'all'}-{'flip' if options.flip else 'no-flip'}"


def averaged(paths: Sequence[str]) -> Embeddings:
    """Return the mean of the features in several files, as `vgg-jax extract --scales` averages over scales."""
    files = [load_embeddings(path) for path in paths]
    features = {layer: np.mean([file.features[layer] for file in files], 0) for layer in LAYERS}
    view = {**files[0].description["view"], "scales": [file.description["view"]["scales"][0] for file in files]}
    return dataclasses.replace(files[0], features=features, description={**files[0].description, "view": view})


def rows(net: Network, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row of the table for each layer and size; complete rows are read from the directory of runs."""
    several = [tuple(options.sizes)] if len(options.sizes) > 1 else []
    places: list[tuple[tuple[int, ...], Files, str]] = []
    for scales in [*((size,) for size in options.sizes), *several]:
        files = {split: [extracted(net, options, size, split) for size in scales] for split in ("train", "test")}
        places += [(scales, files, layer) for layer in LAYERS]
    if options.jobs == 1:
        return [row(options, *place) for place in places]
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(row, *zip(*((options, *place) for place in places), strict=True)))


def row(options: argparse.Namespace, scales: tuple[int, ...], files: Files, layer: str) -> dict[str, Any]:
    """Return a row of the table: read it if it is complete, else train the classifier."""
    name = f"{'-'.join(map(str, scales))}-{variant(options)}-{layer}-{options.classifier}.json"
    path = os.path.join(options.runs_dir, name)
    if not os.path.exists(path):
        start = time.perf_counter()
        train, test = (averaged([path for path, _ in files[split]]) for split in ("train", "test"))
        probe = probe_files(train, test, layer, options.classifier, report=lambda line: print(f"  {line}"))
        seconds = sum(seconds for parts in files.values() for _, seconds in parts)
        found = {"layer": layer, "scales": scales, **dataclasses.asdict(probe), "interval": probe.interval}
        found |= {"width": train.features[layer].shape[1], "train_images": len(train.names)}
        found |= {"extract_seconds": seconds, "fit_seconds": time.perf_counter() - start}
        with open(path + ".partial", "w") as file:
            json.dump(found, file)
        os.replace(path + ".partial", path)
    with open(path) as file:
        result: dict[str, Any] = json.load(file)
    print(line(result), flush=True)
    return result


def line(row: dict[str, Any]) -> str:
    """Return a row of the table in Markdown."""
    low, high = row["interval"]
    sizes = ", ".join(f"{scale}x{scale}" for scale in row["scales"])
    accuracy = row["correct"] / row["total"]
    return (
        f"| {row['layer']} | {sizes} | {row['width']} | {accuracy:.2%} | {low:.2%} to {high:.2%} | "
        f"{row['strength']:g} | {row['extract_seconds']:,.0f} s | {row['fit_seconds']:,.0f} s |"
    )


def write(options: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    """Write both result files."""
    stated = environment()
    shared = [f"{options.jobs} classifiers shared the machine, so their seconds are no measurement of speed."]
    shared = shared if options.jobs > 1 else []
    with open(os.path.join(options.out, "probe.json"), "w") as file:
        json.dump({"rows": found, **stated}, file, indent=1)
    lines = [
        *("# A linear probe of frozen ImageNet features", "", *table(stated), ""),
        f"{found[0]['train_images']:,} training images, {found[0]['total']:,} test images. The features are averaged",
        f"over positions{' and the horizontal flip' if options.flip else ''}, and normalized. The classifier is "
        f"`{options.classifier}` of `vgg-jax probe`.",
        "C is chosen on a fifth of the training images. The seconds of the extraction are those of all layers",
        "together, of the process that completed it.",
        *shared,
        "",
        "| after | images | features | accuracy | 95 % interval | C | extraction | classifier |",
        "|---" * 8 + "|",
        *map(line, found),
    ]
    with open(os.path.join(options.out, "probe.md"), "w") as file:
        file.write("\n".join(lines) + "\n")


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = os.path.dirname(os.path.abspath(__file__))
    parser.add_argument("data", type=data_folder, help="folder with train/CLASS/IMAGE and test/CLASS/IMAGE")
    parser.add_argument("--weights", required=True, help="the paper authors' convolutional part, BGR")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="(default: 64 128)")
    parser.add_argument("--per-class", type=int, default=0, help="training images of each class (default: all)")
    parser.add_argument("--classifier", choices=CLASSIFIERS, default="svm", help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="classifiers trained side by side (default: 1)")
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--flip", action=flag, default=True, help="average over the horizontal flip (default: yes)")
    parser.add_argument("--runs-dir", default=os.path.join(os.path.dirname(here), "runs", "probe"))
    parser.add_argument("--out", default=here, help="(default: this folder)")
    options = parser.parse_args()
    configure()
    os.makedirs(options.runs_dir, exist_ok=True)
    smallest = min(options.sizes)
    view = dataclasses.replace(AUTHORS, resize=smallest, crop=smallest)
    net = load(options.weights, features_only=True, preprocessing=view)
    write(options, rows(net, options))


if __name__ == "__main__":
    main()
