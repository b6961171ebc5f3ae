"""vgg_jax beside PyTorch on CIFAR-10: python experiments/cifar10_comparison.py DATA [--runs-dir DIR] [--seeds 0 1]

Trains VGG-11 with batch norm for five epochs on 45,000 training images of the folder DATA, for each seed with train.py
and then with experiments/cifar10_torch.py, as whole commands. Both have the network, the distribution of the initial
weights, the augmentation and the schedule of configs/cifar10_short.py without exponential moving averages, and evaluate
on the other 5,000 images after each epoch with their horizontal flips. PyTorch runs eager or with torch.compile,
whichever a short measurement at the start finds faster for the whole command. The same command resumes, and repeats no
finished run. Writes cifar10_comparison.json and .md, and draws cifar10_comparison.png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from experiments.cifar10_runs import (
    ROOT,
    commands,
    data_fields,
    draw_curves,
    figures,
    is_finished,
    parser,
    train,
    write,
)
from vgg_jax.training.metric_writer import read_metrics

BATCH, RATE, WARMUP = 128, 0.1, 1.0
# These turn off what a plain PyTorch trainer does not have.
OVERRIDES = ("data.alternating_flip=False", "optimizer.ema_decay=0.0", "model.dtype=float32", "whitening=False")
TRAINER = os.path.join(ROOT, "experiments", "cifar10_torch.py")
SIDES = ("vgg_jax", "PyTorch")


def time_of(options: argparse.Namespace, *arguments: str) -> dict[str, float]:
    """Return the seconds of the first step and of a later step of the PyTorch trainer."""
    command = [sys.executable, TRAINER, options.data, "--out", options.runs_dir, "--time-only", *arguments]
    command += ["--train-split", f"train[:{min(options.images, 5000)}]", "--eval-split", "train[:1]"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def faster_form(options: argparse.Namespace) -> dict[str, Any]:
    """Return the measured times of eager and compiled steps, and whether compiling pays; measure only once."""
    path = os.path.join(options.runs_dir, "forms.json")
    if not os.path.exists(path):
        times = {"eager": time_of(options), "compile": time_of(options, "--compile")}
        steps = options.epochs * (options.images // BATCH)
        total = {name: found["first_step"] + steps * found["step"] for name, found in times.items()}
        with open(path, "w") as file:
            json.dump({"seconds": times, "compile": total["compile"] < total["eager"]}, file)
    with open(path) as file:
        found: dict[str, Any] = json.load(file)
    return found


def train_pytorch(options: argparse.Namespace, workdir: str, seed: int, compiled: bool) -> dict[str, Any]:
    """Run the PyTorch trainer unless it is finished; return its curve and times."""
    command = [sys.executable, TRAINER, options.data, "--out", workdir, "--seed", str(seed)]
    command += ["--epochs", str(options.epochs), "--warmup-epochs", str(WARMUP), "--rate", str(RATE)]
    command += ["--train-split", f"train[:{options.images}]", *(["--compile"] if compiled else [])]
    if not is_finished(workdir):
        clock = time.perf_counter()
        with open(workdir + ".log", "w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
        with open(workdir + ".jsonl", "w") as file:
            file.write(json.dumps({"seconds": time.perf_counter() - clock, "exit_code": 0}) + "\n")
    lines = read_metrics(os.path.join(workdir, "metrics.jsonl"))
    return {
        "train": {name: [line[name] for line in lines] for name in ("epoch", "loss")},
        "eval": {name: [line[name] for line in lines] for name in ("epoch", "accuracy")},
        "epoch_seconds": [round(line["seconds"], 1) for line in lines],
        "command_seconds": [round(line["seconds"], 1) for line in commands(workdir)],
    }


def train_ours(options: argparse.Namespace, workdir: str, seed: int) -> dict[str, Any]:
    """Run train.py unless it is finished; return its curve and times."""
    fields = [
        *("model.depth=11", f"seed={seed}", f"num_epochs={options.epochs}", f"batch_size={BATCH}", *OVERRIDES),
        *(f"optimizer.learning_rate={RATE}", f"optimizer.warmup_epochs={WARMUP}"),
        *data_fields(options.data, f"train[:{options.images}]", "train[45000:]"),
    ]
    train("cifar10_short.py", workdir, fields)
    return figures(workdir, BATCH)


def last_loss(run: dict[str, Any]) -> float:
    """Return the mean training loss of the last epoch, of its reports if there are several."""
    epochs, losses = run["train"]["epoch"], run["train"]["loss"]
    return statistics.mean(loss for epoch, loss in zip(epochs, losses, strict=True) if epoch > max(epochs) - 1)


def report(runs: dict[str, dict[str, Any]], form: dict[str, Any], settings: dict[str, Any], out: str) -> None:
    """Write the result files and the picture."""
    rows, means = [], {}
    for side in SIDES:
        mine = [run for name, run in runs.items() if name.startswith(side)]
        accuracies = [run["eval"]["accuracy"][-1] for run in mine]
        epoch = statistics.median(seconds for run in mine for seconds in run["epoch_seconds"])
        command = statistics.mean(sum(run["command_seconds"]) for run in mine)
        interrupted = any(len(run["command_seconds"]) > 1 for run in mine)
        means[side] = {"accuracy": statistics.mean(accuracies), "epoch": epoch, "command": command}
        each = ", ".join(f"{accuracy:.2%}" for accuracy in accuracies)
        losses = ", ".join(f"{last_loss(run):.3f}" for run in mine)
        note = " (interrupted)" if interrupted else ""
        cells = (f"{means[side]['accuracy']:.2%}", each, losses, f"{epoch:.1f}", f"{command:.0f}{note}")
        rows.append(f"| {side} | {' | '.join(cells)} |")
    ours, theirs = (means[side] for side in SIDES)
    times = form["seconds"]
    heads = ["mean accuracy", "each seed", "loss of the last epoch"]
    heads += ["seconds an epoch, median", "seconds of the command, mean"]
    lines = [
        "# vgg_jax beside PyTorch on CIFAR-10",
        "",
        f"VGG-11 with batch norm, {settings['epochs']:g} epochs of {settings['images']:,} training images, float32.",
        "Evaluated on 5,000 other training images with their horizontal flips. Whole commands, in turn.",
        "",
        f"| | {' | '.join(heads)} |",
        *("|---" * (1 + len(heads)) + "|", *rows, ""),
        f"Difference of the mean accuracies: {100 * (ours['accuracy'] - theirs['accuracy']):+.2f} points. PyTorch",
        f"takes {theirs['epoch'] / ours['epoch']:.2f} times as long by the epoch, and "
        f"{theirs['command'] / ours['command']:.2f} times by the command.",
        "",
        f"PyTorch ran {'with torch.compile' if form['compile'] else 'eager'}. A step took "
        f"{times['eager']['step']:.3f} s eager and {times['compile']['step']:.3f} s compiled,",
        f"the first step {times['eager']['first_step']:.1f} s and {times['compile']['first_step']:.1f} s.",
        *("", "![Accuracy after each epoch](cifar10_comparison.png)"),
    ]
    write(out, "cifar10_comparison", {**settings, "forms": form, "means": means, "runs": runs}, lines)
    draw(os.path.join(out, "cifar10_comparison.png"), {"runs": runs})


def draw(path: str | os.PathLike[str], result: dict[str, Any]) -> None:
    """Draw the accuracy after each epoch of all runs of a result file."""
    curves = {name: run["eval"] for name, run in result["runs"].items()}
    draw_curves(path, curves, "5,000 held-out images, JPEG copy of CIFAR-10")


def main() -> None:
    """Run what is missing, and write the results."""
    options = parser(__doc__ or "", "cifar10_comparison")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="(default: 0 1)")
    options.add_argument("--epochs", type=int, default=5, help="(default: %(default)s)")
    options.add_argument("--images", type=int, default=45_000, help="training images (default: %(default)s)")
    chosen = options.parse_args()
    os.makedirs(chosen.runs_dir, exist_ok=True)
    form = faster_form(chosen)
    runs: dict[str, dict[str, Any]] = {}
    for seed in chosen.seeds:
        ours, theirs = (os.path.join(chosen.runs_dir, f"{side}-seed{seed}") for side in SIDES)
        runs[f"{SIDES[0]}, seed {seed}"] = train_ours(chosen, ours, seed)
        runs[f"{SIDES[1]}, seed {seed}"] = train_pytorch(chosen, theirs, seed, form["compile"])
    report(runs, form, {"epochs": chosen.epochs, "images": chosen.images, "seeds": chosen.seeds}, chosen.out)
    print(f"see {os.path.join(chosen.out, 'cifar10_comparison.md')}")


if __name__ == "__main__":
    main()
