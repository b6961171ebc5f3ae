"""Plain VGG-16 and VGG-19 on CIFAR-10: python experiments/cifar10_plain.py DATA [--runs-dir DIR] [--only D E]

Trains configs/cifar10_plain.py, without batch norm: net A for 4 epochs, VGG-16 (D) for 12 and VGG-19 (E) for 4, the
last two from torchvision's initialization and from net A as in section 3.1 of the paper. Trains on 49,000 training
images of the folder DATA, evaluates on the other 1,000 after each epoch, and once at the end on the 10,000 test
images. The same command resumes; a finished run is not repeated. --jobs runs several side by side. Writes
cifar10_plain.json and .md, and draws cifar10_plain.png.
"""

import functools
import os
import sys
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
from experiments.cifar10_test import save_network, test_figures

BATCH = 64
# Depth, epochs and whether net A gives the first layers, by name; net A comes first.
RUNS = {"A": (11, 4, False), "D": (16, 12, False), "D-from-A": (16, 12, True)}
RUNS |= {"E": (19, 4, False), "E-from-A": (19, 4, True)}


def report(results: dict[str, dict[str, Any]], settings: dict[str, Any], out: str) -> None:
    """Write the result files and the picture."""
    rows = []
    for name, result in results.items():
        depth, _, from_a = RUNS[name]
        by_epoch = " ".join(f"{100 * value:.1f}" for value in result["eval"]["accuracy"])
        seconds = sum(result["epoch_seconds"]) / len(result["epoch_seconds"])
        start = "net A" if from_a else "torchvision's initialization"
        test = result["test"]
        cells = [f"VGG-{depth}", start, by_epoch, *(f"{test[v]['accuracy']:.2%}" for v in ("plain", "flip"))]
        rows.append("| " + " | ".join([*cells, f"{seconds:.0f}"]) + " |")
    lines = [
        "# Plain VGG on CIFAR-10",
        "",
        f"`configs/cifar10_plain.py`, no batch norm, {settings['images']:,} training images, seed 0. The last column",
        "gives the seconds of training in an epoch.",
        "",
        *shared(settings["jobs"]),
        "| network | from | held-out training images after each epoch, % | test images | with horizontal flip | s |",
        "|---|---|---|---|---|---|",
        *rows,
        *("", "![Accuracy after each epoch](cifar10_plain.png)"),
    ]
    write(out, "cifar10_plain", {**settings, "runs": results}, lines)
    draw(os.path.join(out, "cifar10_plain.png"), {"runs": results})


def draw(path: str | os.PathLike[str], result: dict[str, Any]) -> None:
    """Draw the accuracy after each epoch of all runs of a result file."""
    curves = {name: run["eval"] for name, run in result["runs"].items()}
    draw_curves(path, curves, "1,000 held-out images, JPEG copy of CIFAR-10")


def main() -> None:
    """Train the missing runs, one after the other, and write the results after each."""
    options = parser(__doc__ or "", "cifar10_plain")
    options.add_argument("--only", nargs="+", choices=list(RUNS), help="runs besides net A (default: all)")
    options.add_argument("--images", type=int, default=49_000, help="training images (default: %(default)s)")
    options.add_argument("--shortened", type=float, default=1, help="factor of all epochs, to try the command")
    chosen = options.parse_args()
    workdirs = {name: os.path.join(chosen.runs_dir, name) for name in RUNS}
    settings = {"images": chosen.images, "shortened": chosen.shortened, "seed": 0, "jobs": chosen.jobs}

    def run(name: str) -> None:
        depth, epochs, from_a = RUNS[name]
        fields = [
            f"model.depth={depth}",
            f"num_epochs={epochs * chosen.shortened}",
            *data_fields(chosen.data, f"train[:{chosen.images}]", "train[49000:]"),
            *([f"init_from={os.path.abspath(workdirs['A'])}"] if from_a else []),
        ]
        train("cifar10_plain.py", workdirs[name], fields)

    run("A")
    side_by_side([functools.partial(run, name) for name in RUNS if name in (chosen.only or RUNS)], chosen.jobs)
    results = {}
    for name, path in workdirs.items():
        if is_finished(path):
            test = test_figures(path, chosen.data)
            accuracy = {view: test[view]["accuracy"] for view in test}
            card = save_network(path, {**settings, "run": name, "test_accuracy": accuracy})
            results[name] = {**figures(path, BATCH), "test": test, "card": card}
            print(f"{name}: {accuracy['flip']:.2%} of the test images", flush=True)
    report(results, settings, chosen.out)


if __name__ == "__main__":
    main()
