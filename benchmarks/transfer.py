"""What transfer gains: python benchmarks/transfer.py [--runs-dir DIR]

Trains configs/digits_features.py on the digits 0 to 4; then, for five seeds, configs/digits_transfer.py on ten images
each of 5 to 9: on those features; on random ones, as a new network has them; on random convolutions whose batch norm
trains with the head, so that the activations are of the usual size; and with nothing frozen. Each seed draws other
images. Then times a training step with frozen features beside one that trains everything, in turn. A quarter of an
hour on 2 cores.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vgg_jax.config import Config, create_model
from vgg_jax.optimizer import make_optimizer
from vgg_jax.run_directory import read_config
from vgg_jax.training import create_train_state, train_step

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SEEDS = range(5)
ROUNDS = 15


def train(config: str, workdir: str, *overrides: str) -> float:
    """Runs train.py, unless it is finished in `workdir`; returns the last accuracy."""
    command = [sys.executable, os.path.join(ROOT, "train.py"), "--config", os.path.join(ROOT, "configs", config)]
    subprocess.run([*command, "--workdir", workdir, *overrides], check=True, stdout=subprocess.DEVNULL)
    with open(os.path.join(workdir, "metrics.jsonl")) as file:
        return [line["accuracy"] for line in map(json.loads, file) if line["kind"] == "eval"][-1]


def accuracies(runs_dir: str) -> dict[str, list[float]]:
    """The accuracies on the held-out digits 5 to 9, by seed, on learned and on random features."""
    source = os.path.join(runs_dir, "source")
    print(f"digits 0 to 4: {train('digits_features.py', source):.2%}", flush=True)
    features = create_model(read_config(source).model).layers_with_parameters(("features",))
    convolutions = tuple(layer for layer in features if layer.startswith("conv"))
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
    """The median seconds of a step with the configuration's frozen layers, and of one without any, taken in turn."""
    model = create_model(config.model)
    optimizer = make_optimizer(config.optimizer, optax.constant_schedule(config.optimizer.learning_rate))
    size, channels = config.data.image_size, len(config.data.mean)
    batch = {
        "image": jnp.asarray(
            np.random.default_rng(0).normal(size=(config.batch_size, size, size, channels)), "float32"
        ),
        "label": jnp.arange(config.batch_size) % config.model.num_classes,
    }
    step = jax.jit(train_step, donate_argnums=0)
    create = functools.partial(create_train_state, jax.random.key(0), model, optimizer, (size, size, channels))
    states = {"frozen": jax.jit(lambda: create(frozen=config.freeze))(), "whole": jax.jit(create)()}
    seconds: dict[str, list[float]] = {name: [] for name in states}
    for _ in range(ROUNDS + 1):
        for name in states:
            start = time.perf_counter()
            states[name], _ = jax.block_until_ready(step(states[name], batch, jax.random.key(1)))
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first compiles


def main() -> None:
    """Trains what is missing, times the steps, and prints the figures."""
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
