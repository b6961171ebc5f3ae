"""The search for configs/cifar10_short.py: ten short runs on CIFAR-10, and some as long as the recipe.

    python experiments/cifar10_search.py DATA [--long] [--runs-dir DIR] [--only ARM ...] [--images 45000] [--jobs 1]

The short runs train VGG-11 for 6 epochs and change one thing each; --long trains VGG-16 for 25 epochs. Trains with
batch norm on the first part of the training images of the folder DATA and evaluates on its last 5,000, in the order
that parts of folders have (docs/data.md). Never reads the test images. The same command resumes; a finished run is not
repeated. Writes cifar10_search.json and .md with all finished runs, and draws cifar10_search.png from them; with
--long, cifar10_search_long.
"""

import functools
import os
import sys
import threading
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from experiments.cifar10_runs import (
    data_fields,
    draw_curves,
    figures,
    is_finished,
    parser,
    shared,
    side_by_side,
    train,
    write,
)

HELD_OUT = "train[45000:]"
OF_VGG16 = ("data.pad_mode=zeros", "optimizer.schedule=cosine")
# The overrides of configs/cifar10_short.py by the name of the run.
ARMS: dict[str, tuple[str, ...]] = {
    "vgg16-recipe": OF_VGG16,
    "cifar10_short": (),
    "whitening": ("whitening=True",),
    "cosine": ("optimizer.schedule=cosine",),
    "zero-padding": ("data.pad_mode=zeros",),
    "rate-0.05": ("optimizer.learning_rate=0.05",),
    "rate-0.2": ("optimizer.learning_rate=0.2",),
    "batch-64": ("batch_size=64",),
    "cutout-8": ("data.cutout=8",),
    "ema-0.98": ("optimizer.ema_decay=0.98",),
}
EMA = "optimizer.ema_decay=0.995"  # of the other short runs, which have fewer updates than 25 epochs
LONG_ARMS: dict[str, tuple[str, ...]] = {
    "cifar10_short": (),
    "pad-2": ("data.pad=2",),
    "pad-2-rate-0.2": ("data.pad=2", "optimizer.learning_rate=0.2"),
    "pad-2-decay-1e-3": ("data.pad=2", "optimizer.weight_decay=1e-3"),
    "pad-2-smoothing-0.2": ("data.pad=2", "label_smoothing=0.2"),
    "batch-64": ("batch_size=64",),
    "pad-2-batch-64": ("data.pad=2", "batch_size=64"),
    "pad-2-batch-64-decay-1e-3": ("data.pad=2", "batch_size=64", "optimizer.weight_decay=1e-3"),
}


def result_of(overrides: tuple[str, ...], workdir: str) -> dict[str, Any]:
    """Return the figures of one run."""
    batch_size = next((int(f.split("=")[1]) for f in overrides if f.startswith("batch_size=")), 128)
    return {"overrides": overrides, **figures(workdir, batch_size)}


def report(name: str, results: dict[str, dict[str, Any]], settings: dict[str, Any], out: str) -> None:
    """Write the result files and the picture."""
    rows = []
    for arm, result in sorted(results.items(), key=lambda item: -item[1]["eval"]["accuracy"][-1]):
        curve, fields = result["eval"], ", ".join(f"`{field}`" for field in result["overrides"]) or "none"
        by_epoch = " ".join(f"{100 * value:.1f}" for value in curve["accuracy"][:-1])
        seconds = sum(result["epoch_seconds"]) / len(result["epoch_seconds"])
        rows.append(f"| {arm} | {fields} | {by_epoch} | {curve['accuracy'][-1]:.2%} | {seconds:.0f} |")
    all_runs = " ".join(f"`{field}` unless stated" for field in settings["fields"]) or "all other fields as there"
    lines = [
        f"# The search for a recipe: VGG-{settings['depth']} in {settings['epochs']:g} epochs",
        "",
        f"VGG-{settings['depth']} with batch norm, `configs/cifar10_short.py`, seed 0. Number of epochs: "
        f"{settings['epochs']:g}, a fifth of them warm-up.",
        f"Training images: {settings['images']:,}; {all_runs}. Evaluated on 5,000",
        "other training images, each with its horizontal flip. Each is one run, so differences below a point mean",
        "little: the standard error of 85 % of 5,000 images is 0.5 points, and that of another seed adds to it.",
        "",
        *shared(settings["jobs"]),
        *("| run | overrides | after each epoch, % | at the end | seconds an epoch |", "|---|---|---|---|---|"),
        *rows,
        *("", f"![Accuracy after each epoch]({name}.png)"),
    ]
    write(out, name, {**settings, "runs": results}, lines)
    draw(os.path.join(out, f"{name}.png"), {"runs": results})


def draw(path: str | os.PathLike[str], result: dict[str, Any]) -> None:
    """Draw the accuracy after each epoch of all runs of a result file."""
    curves = {name: run["eval"] for name, run in result["runs"].items()}
    draw_curves(path, curves, "5,000 held-out training images, JPEG copy of CIFAR-10")


def main() -> None:
    """Train the missing runs, one after the other, and write the results after each."""
    options = parser(__doc__ or "", "cifar10_search")
    options.add_argument("--long", action="store_true", help="the runs of VGG-16 for 25 epochs")
    options.add_argument("--only", nargs="+", metavar="ARM", help=f"some of: {', '.join({**ARMS, **LONG_ARMS})}")
    options.add_argument("--depth", type=int, help="(default: 11; 16 with --long)")
    options.add_argument("--epochs", type=float, help="(default: 6; 25 with --long)")
    options.add_argument("--images", type=int, default=45_000, help="training images (default: %(default)s)")
    chosen = options.parse_args()
    arms = LONG_ARMS if chosen.long else ARMS
    if unknown := set(chosen.only or ()) - set(arms):
        options.error(f"found no run {', '.join(sorted(unknown))}; expected some of {', '.join(arms)}")
    epochs = chosen.epochs or (25 if chosen.long else 6)
    settings = {"depth": chosen.depth or (16 if chosen.long else 11), "epochs": epochs, "images": chosen.images}
    settings |= {"seed": 0, "jobs": chosen.jobs, "fields": [] if chosen.long else [EMA]}
    workdirs = {name: os.path.join(chosen.runs_dir, f"long-{name}" if chosen.long else name) for name in arms}
    writing = threading.Lock()

    def run(name: str) -> None:
        fields = [
            f"model.depth={settings['depth']}",
            f"num_epochs={epochs}",
            f"optimizer.warmup_epochs={epochs / 5}",
            *([] if any("ema_decay" in field for field in arms[name]) else settings["fields"]),
            *data_fields(chosen.data, f"train[:{chosen.images}]", HELD_OUT),
        ]
        train("cifar10_short.py", workdirs[name], [*fields, *arms[name]])
        with writing:
            results = {name: result_of(arms[name], path) for name, path in workdirs.items() if is_finished(path)}
            report("cifar10_search_long" if chosen.long else "cifar10_search", results, settings, chosen.out)
            print(f"{name}: {results[name]['eval']['accuracy'][-1]:.2%}", flush=True)

    side_by_side([functools.partial(run, name) for name in chosen.only or arms], chosen.jobs)


if __name__ == "__main__":
    main()
