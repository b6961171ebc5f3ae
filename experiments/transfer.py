"""The gain from transfer: python experiments/transfer.py [--runs-dir DIR]

Trains configs/digits_features.py on the digits 0 to 4. Then trains configs/digits_transfer.py on ten images of each of
the digits 5 to 9, for five seeds, in four ways: with those features; with random features of a new network; with random
convolutions whose batch norm trains, so that the activations have the usual scale; and with nothing frozen. Each seed
draws other images. Finally times a training step with frozen features and one that trains everything, in turn. Takes a
quarter of an hour on 2 cores.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time

import jax

from vgg_jax.config import Config
from vgg_jax.training.loop import build
from vgg_jax.training.run_directory import read_config, resolve_dtype
from vgg_jax.training.sharding import make_mesh
from vgg_jax.training.validation import create_model

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SEEDS = range(5)
ROUNDS = 15


def train(config: str, workdir: str, *overrides: str) -> float:
    """Run train.py, unless the run in `workdir` is finished; return its last accuracy."""
    command = [sys.executable, os.path.join(ROOT, "train.py"), "--config", os.path.join(ROOT, "configs", config)]
    subprocess.run([*command, "--workdir", workdir, *overrides], check=True, stdout=subprocess.DEVNULL)
    with open(os.path.join(workdir, "metrics.jsonl")) as file:
        return [line["accuracy"] for line in map(json.loads, file) if line["kind"] == "eval"][-1]


def accuracies(runs_dir: str) -> dict[str, list[float]]:
    """Return the accuracies on the held-out digits 5 to 9 by kind of features, one for each seed."""
    source = os.path.join(runs_dir, "source")
    print(f"digits 0 to 4: {train('digits_features.py', source):.2%}", flush=True)
    stages = create_model(read_config(source).model).stages
    convolutions = tuple(layer.name for layer in itertools.chain(*stages) if layer.kind == "conv")
    results: dict[str, list[float]] = {}
    for name, init_from, freeze in (
        ("learned on 0 to 4", source, ("features",)),
        ("random", "", ("features",)),
        ("random, batch norm trains", "", convolutions),
        ("nothing frozen", "", ()),
    ):
        for seed in SEEDS:
            workdir = os.path.join(runs_dir, f"{name.replace(' ', '_')}-seed{seed}")
            overrides = (f"--config.init_from={init_from}", f"--config.freeze={freeze}", f"--config.seed={seed}")
            results.setdefault(name, []).append(train("digits_transfer.py", workdir, *overrides))
        per_seed = ", ".join(f"{accuracy:.2%}" for accuracy in results[name])
        print(f"features {name}: mean {statistics.mean(results[name]):.2%} ({per_seed})", flush=True)
    return results


def step_seconds(config: Config) -> dict[str, float]:
    """Return the median seconds of a step with frozen layers and of one without, taken in turn."""
    configs = {"frozen": config, "whole": dataclasses.replace(config, freeze=())}
    runs = {name: build(resolve_dtype(config), make_mesh()) for name, config in configs.items()}
    states = {name: run.new_state() for name, run in runs.items()}
    batch = next(runs["whole"].train_loader.train_batches(config.seed, config.step_size, range(1)))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            states[name], _ = jax.block_until_ready(run.train_step(states[name], batch, run.step_key))
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first step compiles


def main() -> None:
    """Train the missing runs, time the steps, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", default=os.path.join(ROOT, "runs", "transfer"))
    runs_dir = parser.parse_args().runs_dir
    accuracies(runs_dir)
    config = read_config(os.path.join(runs_dir, f"random-seed{SEEDS[0]}"))
    for depth in (11, 16):
        for batch_norm in (True, False):
            model = dataclasses.replace(config.model, depth=depth, batch_norm=batch_norm)
            seconds = step_seconds(dataclasses.replace(config, model=model))
            print(
                f"VGG-{depth}{' with batch norm' if batch_norm else ''}, batch {config.batch_size}: a step with frozen "
                f"features {seconds['frozen']:.3f} s, whole {seconds['whole']:.3f} s, "
                f"ratio {seconds['frozen'] / seconds['whole']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
