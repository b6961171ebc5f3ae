"""VGG-16 with batch norm on CIFAR-10 in 25 epochs: python experiments/cifar10_final.py DATA [--runs-dir DIR] [--seed 0]

Trains configs/cifar10_short.py on 49,000 training images of the folder DATA, evaluates on the other 1,000 after each
epoch, and at the end once on the 10,000 test images, with and without the horizontal flip. The same command resumes a
stopped run. Writes cifar10_final.json and .md, and draws curves, confusion matrix and accuracy of each class from the
json into cifar10_final.png. Keeps the network as .safetensors with a card beside the run.
"""

import json
import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from experiments.cifar10_runs import data_fields, figures, parser, train, write
from experiments.cifar10_test import save_network, test_figures
from vgg_jax.look import FAINT, INK, picture

BATCH = 128


def draw(path: str | os.PathLike[str], result: dict[str, Any]) -> None:
    """Draw the curves, the confusion matrix and the accuracy of each class."""
    flipped = result["test"]["flip"]
    with picture(path, (14, 4.6), dpi=100) as figure:
        curves, confusion, bars = figure.subplots(1, 3, width_ratios=(1.1, 1.1, 0.8))
        for kind, label, style in (("train", "training, augmented", "-"), ("eval", "held-out training images", "o-")):
            curve = result[kind]
            curves.plot(curve["epoch"], [100 * a for a in curve["accuracy"]], style, label=label)
        label = f"test images: {flipped['accuracy']:.2%}"
        curves.axhline(100 * flipped["accuracy"], color=FAINT, linestyle=":", label=label)
        curves.set(xlabel="epoch", ylabel="accuracy, %", title="Accuracy during training")
        curves.grid()
        curves.legend(loc="lower right")
        draw_confusion(confusion, list(flipped["per_class"]), flipped["confusion"])
        order = sorted(flipped["per_class"], key=lambda name: flipped["per_class"][name])
        drawn = bars.barh(order, [100 * flipped["per_class"][name] for name in order])
        bars.bar_label(drawn, fmt="%.1f", padding=2)
        bars.set(xlabel="accuracy, %", title="Accuracy of each class", xlim=(0, 112))
        figure.suptitle(f"CIFAR-10, JPEG copy: {flipped['images']:,} test images, each with its horizontal flip")


def draw_confusion(axes: Any, names: list[str], matrix: list[list[int]]) -> None:
    """Draw the number of images by true and predicted class; the color shows the errors only."""
    axes.imshow([[0 if i == j else n for j, n in enumerate(row)] for i, row in enumerate(matrix)], cmap="Oranges")
    most = max(n for i, row in enumerate(matrix) for j, n in enumerate(row) if i != j)
    for i, row in enumerate(matrix):
        for j, count in enumerate(row):
            color = FAINT if i == j else "white" if count > 0.7 * most else INK
            axes.text(j, i, count, ha="center", va="center", fontsize=7.5, color=color)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted class", ylabel="true class", title="Test images by true and predicted class")


def lines_of(result: dict[str, Any]) -> list[str]:
    """Return the text of the result file."""
    test, held_out = result["test"], result["eval"]["accuracy"]
    seconds = result["epoch_seconds"]
    by_class = " | ".join(f"{value:.1%}" for value in test["flip"]["per_class"].values())
    classes = list(test["flip"]["per_class"])
    images = f"{test['flip']['images']:,}"
    return [
        f"# VGG-{result['depth']} with batch norm on CIFAR-10 in {result['epochs']:g} epochs",
        "",
        "Training images on the way, test images once at the end; seed "
        f"{result['seed']}. {len(result['command_seconds'])} command(s) of "
        f"{', '.join(f'{s:.0f}' for s in result['command_seconds'])} s.",
        *("", "| images | view | accuracy |", "|---|---|---|"),
        f"| {images} test images | one | {test['plain']['accuracy']:.2%} |",
        f"| the same | with its horizontal flip | {test['flip']['accuracy']:.2%} |",
        f"| held-out training images | with its horizontal flip | {held_out[-1]:.2%} |",
        f"| training images of the last report, augmented | one | {result['train']['accuracy'][-1]:.2%} |",
        "",
        f"An epoch takes {sum(seconds) / len(seconds):.0f} s of training. SHA-256 of the network: "
        f"`{result['card']['sha256']}`.",
        *("", "| " + " | ".join(classes) + " |", "|---" * len(classes) + "|", f"| {by_class} |"),
        *("", "![Curves, confusion matrix and accuracy of each class](cifar10_final.png)"),
    ]


def main() -> None:
    """Train, test, and write the results."""
    options = parser(__doc__ or "", "cifar10_final")
    options.add_argument("--depth", type=int, default=16, help="(default: %(default)s)")
    options.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options.add_argument("--epochs", type=float, default=25, help="(default: %(default)s)")
    options.add_argument("--images", type=int, default=49_000, help="training images (default: %(default)s)")
    options.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="further overrides of the config")
    chosen = options.parse_args()
    fields = [
        f"model.depth={chosen.depth}",
        f"seed={chosen.seed}",
        f"num_epochs={chosen.epochs}",
        f"optimizer.warmup_epochs={chosen.epochs / 5}",
        *chosen.set,
        *data_fields(chosen.data, f"train[:{chosen.images}]", "train[49000:]"),
    ]
    workdir = os.path.join(chosen.runs_dir, f"vgg{chosen.depth}_bn-seed{chosen.seed}")
    train("cifar10_short.py", workdir, fields)
    test = test_figures(workdir, chosen.data)
    settings = {"depth": chosen.depth, "seed": chosen.seed, "epochs": chosen.epochs, "images": chosen.images}
    card = {**settings, "overrides": chosen.set, "test_accuracy": {view: test[view]["accuracy"] for view in test}}
    result = {**card, **figures(workdir, BATCH), "test": test, "card": save_network(workdir, card)}
    write(chosen.out, "cifar10_final", result, lines_of(result))
    with open(os.path.join(chosen.out, "cifar10_final.json")) as file:
        draw(os.path.join(chosen.out, "cifar10_final.png"), json.load(file))
    print("; ".join(f"test images, {view}: {test[view]['accuracy']:.2%}" for view in test))


if __name__ == "__main__":
    main()
