"""Transfer to CIFAR-10 with few and with many labels, beside training from scratch for the same time.

  python experiments/transfer_cifar10.py DATA --weights FILE [--parts sizes fine_tuning habits early_stopping]

DATA holds train/CLASS/IMAGE and test/CLASS/IMAGE. FILE holds the paper authors' convolutions of VGG-16 (BGR, mean
subtracted), see experiments/authors.py. Every run is kept in --runs-dir and resumed if it was stopped.

sizes: configs/transfer_64.py with 10, 100, 1,000 and all images of each class, three draws each, beside
configs/cifar10_short.py on the same images for as many seconds. The seconds of transfer include its features. They come
from the images per second of features, head and network, measured first, one after the other, on all images.
fine_tuning: stage 5 trains with a tenth of the rate of the head, beside the head alone, on all images.
habits: configs/cifar10_short.py with VGG-11 on a part of the images, each time with another habit of the trainer.
early_stopping: the same with an evaluation after each epoch, to the end and with early stopping.

Each part has its result files, transfer_cifar10_PART.json and .md. A picture shows the sizes.
"""

import argparse
import functools
import os
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from experiments.cifar10_runs import commands, data_fields, figures, parser, shared, side_by_side, train, write
from vgg_jax import AUTHORS, load
from vgg_jax.look import picture

NAME = "transfer_cifar10"
EPOCHS = {10: 100, 100: 40, 1000: 20, 0: 10}  # of the head, by images of each class; 0: all images
CALIBRATION_EPOCHS = {"scratch": 2, "frozen": 3}  # the last one is timed
HABITS = {  # of VGG-11, because the differences of a short run count, not its accuracy
    "none": (),
    "mixup": ("mixup=0.2",),
    "cutmix": ("cutmix=1.0",),
    "random erasing": ("data.erasing=0.25",),
    "balanced class weights": ("class_weights=balanced",),
    "balanced sampling": ("data.balanced=True", "data.alternating_flip=False"),
}
STOPPING = ("early_stopping_patience=1", "early_stopping_min_delta=0.01")


def converted(weights: str, directory: str) -> str:
    """Return the path of the weights with their preprocessing, written once."""
    path = os.path.join(directory, "authors.safetensors")
    if not os.path.exists(path):
        os.makedirs(directory, exist_ok=True)
        load(weights, features_only=True, preprocessing=AUTHORS).save(path)
    return path


def authors_fields(weights: str, features_dir: str) -> list[str]:
    """Return the overrides of a run on the authors' features; RGB order, as the run reads its images."""
    mean, std = AUTHORS.mean[::-1], AUTHORS.std
    return [f"init_from={weights}", f"data.mean={mean}", f"data.std={std}", f"features_dir={features_dir}"]


def feature_rate(log: str) -> float:
    """Return the images per second of the training features, from the line of a log that reports them."""
    with open(log) as file:
        found = re.findall(r"computed features of \S*train\S*: ([\d,]+) images in ([\d.]+) s", file.read())
    count, seconds = found[-1]
    return int(count.replace(",", "")) / float(seconds)


class Experiment:
    """The runs of the experiment and their figures."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.options = arguments
        self.splits = data_fields(arguments.data, arguments.train_split, arguments.eval_split)
        self.weights = converted(arguments.weights, arguments.runs_dir)

    def run(self, name: str, config: str, overrides: list[str]) -> dict[str, Any]:
        """Train unless the run is finished; return its last accuracy, its seconds of training and its command."""
        workdir = os.path.join(self.options.runs_dir, name)
        every = ["eval_every_epochs=100000", "checkpoint_every_epochs=1"]
        train(config, workdir, [*self.splits, *every, *overrides])
        batch = 64 if config.startswith("transfer") else 128
        batch = next((int(o.split("=")[1]) for o in overrides if o.startswith("batch_size=")), batch)
        found = figures(workdir, batch)
        accuracy, shown = found["eval"]["accuracy"][-1], commands(workdir)[-1]["command"]
        print(f"{name}: {accuracy:.2%}", flush=True)
        return {
            "accuracy": accuracy,
            "training_seconds": sum(found["epoch_seconds"]),
            "last_epoch_seconds": found["epoch_seconds"][-1],
            "evaluations": {name: found["eval"][name] for name in ("epoch", "accuracy")},
            "command": shown.replace(os.path.abspath(self.options.data), "DATA").replace(self.options.runs_dir, "RUNS"),
        }

    def several(self, calls: Sequence[Callable[[], dict[str, Any]]]) -> list[dict[str, Any]]:
        """Return the figures of independent runs."""
        return side_by_side(calls, self.options.jobs)

    def frozen(
        self, name: str, per_class: int, seed: int, epochs: float, *overrides: str, features_dir: str = "features"
    ) -> dict[str, Any]:
        """Return the figures of a head on cached features."""
        fields = [
            *authors_fields(self.weights, os.path.join(self.options.runs_dir, features_dir)),
            *(f"data.images_per_class={per_class}", f"seed={seed}", f"num_epochs={epochs}"),
            f"batch_size={min(64, self.num_images(per_class))}",
        ]
        return self.run(name, "transfer_64.py", [*fields, *overrides])

    def num_images(self, per_class: int) -> int:
        """Return the training images."""
        return 10 * (per_class or self.options.all_images)

    def rates(self) -> dict[str, float]:
        """Return the images per second of the features, the head and the network, each measured alone.

        A first run on cached features is not timed: after it, the compiled programs are cached.
        """
        per_class, epochs = self.options.sizes[-1], CALIBRATION_EPOCHS
        images = self.num_images(per_class)
        scratch = self.scratch("calibration-scratch", per_class, 0, epochs["scratch"])
        self.frozen("calibration-compile", min(self.options.sizes), 0, 1, features_dir="compile")
        head = self.frozen("calibration-frozen", per_class, 0, epochs["frozen"])
        log = os.path.join(self.options.runs_dir, "calibration-frozen.log")
        return {
            "features": feature_rate(log),
            "head": images / head["last_epoch_seconds"],
            "network": images / scratch["last_epoch_seconds"],
        }

    def sizes(self) -> list[dict[str, Any]]:
        """Return the figures of both ways, for each size and each draw."""
        rates = self.rates()
        rows: list[dict[str, Any]] = []
        calls = []
        for per_class in self.options.sizes:
            images, epochs = self.num_images(per_class), EPOCHS.get(per_class, 20) * self.options.epochs_factor
            seconds = images / rates["features"] + epochs * images / rates["head"]
            scratch_epochs = max(1.0, seconds * rates["network"] / images)
            for seed in range(self.options.draws):
                name = f"{per_class or 'all'}-{seed}"
                rows.append({"images_per_class": per_class, "seed": seed, "seconds": seconds, "rates": rates})
                rows[-1]["scratch_epochs"] = scratch_epochs
                calls.append(functools.partial(self.frozen, f"frozen-{name}", per_class, seed, epochs))
                calls.append(functools.partial(self.scratch, f"scratch-{name}", per_class, seed, scratch_epochs))
        found = self.several(calls)
        for row, frozen, scratch in zip(rows, found[::2], found[1::2], strict=True):
            row |= {"frozen": frozen, "scratch": scratch}
        return rows

    def scratch(self, name: str, per_class: int, seed: int, epochs: float) -> dict[str, Any]:
        """Return the figures of training from scratch."""
        batch = min(128, self.num_images(per_class))
        fields = [f"data.images_per_class={per_class}", f"seed={seed}", f"num_epochs={epochs:.3f}"]
        warmup = [f"optimizer.warmup_epochs={epochs / 5:.3f}", f"batch_size={batch}"]
        return self.run(name, "cifar10_short.py", [*fields, *warmup])

    def fine_tuning(self) -> dict[str, Any]:
        """Return the figures of a trained stage 5 beside those of the head alone."""
        epochs, per_class = 3 * self.options.epochs_factor, self.options.sizes[-1]
        stages = "freeze=('stage1','stage2','stage3','stage4')"
        calls = [
            functools.partial(self.frozen, "head", per_class, 0, epochs),
            functools.partial(self.frozen, "stage5", per_class, 0, epochs, stages, "optimizer.rates=stage5=0.1"),
        ]
        return dict(zip(("head", "stage 5 at a tenth"), self.several(calls), strict=True))

    def habits(self) -> dict[str, Any]:
        """Return the figures of a short run with each habit."""
        return self.short_runs(HABITS)

    def early_stopping(self) -> dict[str, Any]:
        """Return the figures of a short run to the end, and of one that stops early."""
        each_epoch = ("eval_every_epochs=1",)
        return self.short_runs({"to the end": each_epoch, "early stopping": (*each_epoch, *STOPPING)})

    def short_runs(self, runs: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
        """Return the figures of short runs of VGG-11, given the overrides of each by its name."""
        size = f"data.images_per_class={self.options.habit_images}"
        epochs = self.options.habit_epochs
        fields = ["model.depth=11", size, f"num_epochs={epochs}", f"optimizer.warmup_epochs={epochs / 5}"]
        calls = [
            functools.partial(self.run, f"habit-{name.replace(' ', '_')}", "cifar10_short.py", [*fields, *overrides])
            for name, overrides in runs.items()
        ]
        return dict(zip(runs, self.several(calls), strict=True))


def spread(values: list[float]) -> str:
    """Return the mean of accuracies, and the smallest and largest of them."""
    return f"{100 * statistics.mean(values):.2f} ({100 * min(values):.2f} to {100 * max(values):.2f})"


def size_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of the sizes."""
    lines = [
        *("", "## Few and many labels", "", "Test accuracy in %: mean (smallest to largest draw)."),
        "The margin is the smallest one of the draws. Rates that give the seconds, each measured alone: "
        + ", ".join(f"{name} {rate:,.0f} images/s" for name, rate in rows[0]["rates"].items())
        + ".",
        "Training from scratch takes one epoch at least.",
        "",
        "| images of each class | frozen features, new head | from scratch, same time | margin | seconds | epochs |",
        "|---|---|---|---|---|---|",
    ]
    for size in dict.fromkeys(row["images_per_class"] for row in rows):
        some = [row for row in rows if row["images_per_class"] == size]
        frozen, scratch = ([row[kind]["accuracy"] for row in some] for kind in ("frozen", "scratch"))
        margin = 100 * min(a - b for a, b in zip(frozen, scratch, strict=True))
        cost = f"{some[0]['seconds']:.1f} | {some[0]['scratch_epochs']:.1f}"
        lines.append(f"| {size or 'all'} | {spread(frozen)} | {spread(scratch)} | {margin:+.2f} | {cost} |")
    first = rows[0]
    return [
        *lines,
        "",
        "Commands of the first row:",
        "",
        *(f"- `{first[kind]['command']}`" for kind in ("frozen", "scratch")),
    ]


def run_lines(title: str, runs: dict[str, Any]) -> list[str]:
    """Return a table of single runs, with the epochs of the evaluations if a run has several."""
    several = any(len(run["evaluations"]["epoch"]) > 1 for run in runs.values())
    heads = ["run", "test accuracy, %", "evaluations at the epochs", "seconds of training", "command"]
    rows = [heads, ["---"] * len(heads)]
    for name, run in runs.items():
        epochs = " ".join(f"{epoch:g}" for epoch in run["evaluations"]["epoch"])
        accuracy = " ".join(f"{100 * value:.2f}" for value in run["evaluations"]["accuracy"])
        rows.append([name, accuracy, epochs, f"{run['training_seconds']:.0f}", f"`{run['command']}`"])
    return ["", f"## {title}", "", *(f"| {' | '.join(row if several else row[:2] + row[3:])} |" for row in rows)]


def report(directory: str, part: str, found: Any, settings: dict[str, Any]) -> None:
    """Write the table of a part, and draw the picture of the sizes."""
    subjects = {"sizes": "few and many labels", "fine_tuning": "the last stage", "habits": "mixup and other habits"}
    subject = subjects.get(part, part.replace("_", " "))
    lines = [f"# Transfer to CIFAR-10: {subject}", "", *shared(settings["jobs"])[:-1]]
    titles = {
        "fine_tuning": "The last stage at a tenth of the rate",
        "habits": "What each habit changes in a short run",
        "early_stopping": "Early stopping in a short run",
    }
    lines += size_lines(found) if part == "sizes" else run_lines(titles[part], found)
    write(directory, f"{NAME}_{part}", {**settings, "runs": found}, lines)
    if part == "sizes":
        draw(os.path.join(directory, f"{NAME}_{part}.png"), {**settings, "runs": found})


def draw(path: str | os.PathLike[str], result: dict[str, Any]) -> None:
    """Draw the accuracies over the images of each class, from the result file of the sizes."""
    rows, all_images = result["runs"], result["all_images"]
    sizes = list(dict.fromkeys(row["images_per_class"] for row in rows))
    places = [size or all_images for size in sizes]
    with picture(path, (7, 4.5)) as figure:
        axes = figure.subplots()
        for kind, label in (("frozen", "frozen ImageNet features, new head"), ("scratch", "from scratch, same time")):
            values = [[100 * r[kind]["accuracy"] for r in rows if r["images_per_class"] == size] for size in sizes]
            means = [statistics.mean(v) for v in values]
            errors = [
                [m - min(v) for m, v in zip(means, values, strict=True)],
                [max(v) - m for m, v in zip(means, values, strict=True)],
            ]
            axes.errorbar(places, means, errors, fmt="o-", capsize=3, label=label)
        axes.set_xscale("log")
        axes.set_xticks(places, [str(place) for place in places])
        axes.minorticks_off()
        axes.set(
            xlabel="images of each class", ylabel="test accuracy, %", title="CIFAR-10, JPEG copy: transfer and scratch"
        )
        axes.grid()
        axes.legend()


def main() -> None:
    """Train the missing runs, and write the tables and the picture."""
    options = parser(__doc__ or "", NAME)
    options.add_argument("--weights", required=True, help="the authors' convolutions")
    parts = ["sizes", "fine_tuning", "habits", "early_stopping"]
    options.add_argument("--parts", nargs="+", choices=parts, default=parts)
    options.add_argument(
        "--sizes", nargs="*", type=int, default=[10, 100, 1000, 0], help="images of each class; 0: all"
    )
    options.add_argument("--draws", type=int, default=3)
    options.add_argument("--all-images", type=int, default=5000, help="images of each class in all")
    options.add_argument("--epochs-factor", type=float, default=1.0, help="factor of the epochs of the heads")
    options.add_argument("--habit-images", type=int, default=1000, help="images of each class for the habits")
    options.add_argument("--habit-epochs", type=float, default=8.0)
    options.add_argument("--train-split", default="train")
    options.add_argument("--eval-split", default="test")
    arguments = options.parse_args()
    experiment, settings = Experiment(arguments), {"all_images": arguments.all_images, "jobs": arguments.jobs}
    for part in arguments.parts:
        report(arguments.out, part, getattr(experiment, part)(), settings)


if __name__ == "__main__":
    main()
