"""The effect of recipes on the embedded digits: python experiments/recipes.py [--runs-dir DIR] [EXPERIMENT ...]

  preinitialization  plain VGG-16 from torchvision's initialization, and from a trained net A as in section 3.1 of the
                     paper: the epochs, of 30, that each needs to reach 97 %, with configs/digits_plain.py and hidden
                     layers as in the paper, three seeds
  precision          VGG-11 with batch norm with configs/digits.py in float32 and in bfloat16: the final accuracies,
                     three seeds

Runs one `train.py` after the other. A complete run in the directory of runs is not repeated. Takes about an hour on 2
cores.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time

from vgg_jax.training.metric_writer import read_metrics

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SEEDS = range(3)
GOAL = 0.97
HEAD = ("model.hidden=(1024, 1024)", "model.dropout_rate=0.0")
# As in the paper: the first four convolutions of net A, and all dense layers.
INIT_LAYERS = ("conv1_1", "conv2_1", "conv3_1", "conv3_2", "head")


def evaluations(workdir: str) -> list[tuple[float, float]]:
    """Return the epochs and the accuracies of the evaluations so far."""
    lines = read_metrics(os.path.join(workdir, "metrics.jsonl"))
    return [(line["epoch"], line["accuracy"]) for line in lines if line["kind"] == "eval"]


def train(config: str, workdir: str, *overrides: str, goal: float = 1.1) -> list[tuple[float, float]]:
    """Run train.py until it ends or an evaluation reaches `goal`; return all evaluations."""
    command = [sys.executable, os.path.join(ROOT, "train.py"), "--config", os.path.join(ROOT, "configs", config)]
    fields = [f"--config.{override}" for override in overrides]
    os.makedirs(os.path.dirname(workdir), exist_ok=True)
    if any(accuracy >= goal for _, accuracy in evaluations(workdir)):
        return evaluations(workdir)
    with (
        open(workdir + ".log", "a") as log,
        subprocess.Popen([*command, *fields, "--workdir", workdir], stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        while process.poll() is None:
            time.sleep(1)
            if any(accuracy >= goal for _, accuracy in evaluations(workdir)):
                process.send_signal(signal.SIGTERM)
                process.wait()
    if process.returncode not in (0, 128 + signal.SIGTERM):
        raise SystemExit(f"a run ended with exit code {process.returncode}; see {workdir}.log")
    return evaluations(workdir)


def preinitialization(runs_dir: str) -> None:
    """Print the epochs to the goal from torchvision's initialization and from net A."""
    net_a = os.path.join(runs_dir, "A")
    print(f"net A: {train('digits_plain.py', net_a, 'model.depth=11', *HEAD)[-1][1]:.2%}", flush=True)
    arms = {
        "from net A": (f"init_from={net_a}", f"init_layers={INIT_LAYERS}"),
        "torchvision's initialization": (),
    }
    print(f"| VGG-16 | seed | first epoch of at least {GOAL:.0%} |\n|---|---|---|", flush=True)
    for name, overrides in arms.items():
        for seed in SEEDS:
            workdir = os.path.join(runs_dir, f"D-{'A' if overrides else 'new'}-seed{seed}")
            fields = ("model.depth=16", f"seed={seed}", "num_epochs=30", *HEAD, *overrides)
            curve = train("digits_plain.py", workdir, *fields, goal=GOAL)
            reached = [epoch for epoch, accuracy in curve if accuracy >= GOAL]
            best = max(accuracy for _, accuracy in curve)
            print(f"| {name} | {seed} | {reached[0] if reached else f'never; best {best:.2%}'} |", flush=True)


def precision(runs_dir: str) -> None:
    """Print the accuracies in float32 and in bfloat16."""
    for dtype in ("float32", "bfloat16"):
        results = []
        for seed in SEEDS:
            workdir = os.path.join(runs_dir, f"{dtype}-seed{seed}")
            results.append(train("digits.py", workdir, f"model.dtype={dtype}", f"seed={seed}")[-1][1])
        per_seed = ", ".join(f"{accuracy:.2%}" for accuracy in results)
        print(f"{dtype}: mean {statistics.mean(results):.2%} ({per_seed})", flush=True)


EXPERIMENTS = {"preinitialization": preinitialization, "precision": precision}


def main() -> None:
    """Run the experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", default=list(EXPERIMENTS))
    parser.add_argument("--runs-dir", default=os.path.join(ROOT, "runs", "recipes"))
    options = parser.parse_args()
    for name in options.experiments:
        if name not in EXPERIMENTS:
            parser.error(f"found no experiment {name!r}; expected some of {', '.join(EXPERIMENTS)}")
        EXPERIMENTS[name](os.path.join(options.runs_dir, name))


if __name__ == "__main__":
    main()
