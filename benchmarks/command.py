"""What train.py takes besides its steps: before the first one, and between them.

    python benchmarks/command.py [--config FILE] [--epochs N] [--rounds N]

First it starts the command with an empty compilation cache and with the one that this leaves, and prints the seconds
until the first step has been reported. Then it trains N epochs, without an evaluation or a save but the last, and
prints the images per second of the loop, and those of the same step alone, on one batch that lies ready.
"""

import argparse
import dataclasses
import os
import platform
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import jax  # noqa: E402

import train  # noqa: E402
from benchmarks.run_parts import run_parts  # noqa: E402
from vgg_jax.allocator import keep_freed_memory  # noqa: E402
from vgg_jax.config import Config  # noqa: E402
from vgg_jax.reporting import read_metrics  # noqa: E402

FIRST_STEP = re.compile(rb"\bstep 1/")


def seconds_to_first_step(config_file: str, cache: str) -> float:
    """From the start of the command to the line of its first step; then it is killed."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, os.path.join(ROOT, "train.py"), "--config", config_file]
        command += ["--workdir", workdir, "--config.log_every_steps=1"]
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
            assert process.stdout
            found = any(FIRST_STEP.search(line) for line in process.stdout)
            seconds = time.perf_counter() - start
            process.kill()
    if not found:
        raise SystemExit("the command ended before its first step")
    return seconds


def images_per_second_of_run(config: Config) -> float:
    """Of the whole loop, after its first report: by then all is compiled, and batches are read ahead."""
    with tempfile.TemporaryDirectory() as workdir:
        if train.train_and_evaluate(config, workdir):
            raise SystemExit("the run failed")
        lines = [line for line in read_metrics(os.path.join(workdir, "metrics.jsonl")) if line["kind"] == "train"]
    return statistics.harmonic_mean([line["images_per_second"] for line in lines[1:]])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=os.path.join(ROOT, "configs", "digits.py"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="starts with a warm cache (%(default)s); 0: no starts")
    arguments = parser.parse_args()
    if arguments.rounds:
        with tempfile.TemporaryDirectory() as cache:
            cold = seconds_to_first_step(arguments.config, cache)
            warm = statistics.median(seconds_to_first_step(arguments.config, cache) for _ in range(arguments.rounds))
        print(f"first step after {cold:.1f} s, {warm:.1f} s where it has been compiled before", flush=True)

    keep_freed_memory()  # as train.py
    config = runpy.run_path(arguments.config)["get_config"]()
    config = dataclasses.replace(
        config,
        num_epochs=arguments.epochs,
        eval_every_epochs=arguments.epochs,
        checkpoint_every_epochs=arguments.epochs,
    )
    rate = images_per_second_of_run(config)
    parts = run_parts(config)
    state, batch = parts.state, next(parts.loader.train_batches(0, config.step_size, range(1)))
    alone = []
    for _ in range(3 * parts.steps_per_epoch):
        start = time.perf_counter()
        state, metrics = parts.step(state, batch, jax.random.key(0))
        jax.block_until_ready((state, metrics))
        alone.append(time.perf_counter() - start)
    rate_alone = config.step_size / statistics.median(alone[2:])
    print(
        f"in the loop {rate:.1f} images/s, the step alone {rate_alone:.1f}: {rate / rate_alone:.1%}\n"
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, JAX {jax.__version__}"
    )


if __name__ == "__main__":
    main()
