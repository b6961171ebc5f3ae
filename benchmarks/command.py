"""What train.py takes besides its steps: before the first one, and between them.

    python benchmarks/command.py [--config FILE] [--epochs N] [--rounds N]

First it starts the command with an empty compilation cache and with the one that this leaves, and prints the seconds
until the first step has been reported. Then it trains N epochs under JAX's profiler, without an evaluation or a save
but the last, and prints which part of the loop's time its step was running, and what it was not; and beside it the same
step alone, on one batch that lies ready.
"""

import argparse
import dataclasses
import glob
import itertools
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


def steps_of_run(config: Config) -> list[tuple[float, float]]:
    """When each of its steps began and ended on the device, in seconds, as JAX's profiler saw them."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as trace, tempfile.TemporaryDirectory() as workdir:
        with jax.profiler.trace(trace, profiler_options=options):
            if train.train_and_evaluate(config, workdir):
                raise SystemExit("the run failed")
        (path,) = glob.glob(os.path.join(trace, "**", "*.xplane.pb"), recursive=True)
        planes = jax.profiler.ProfileData.from_file(path).planes
        programs = [
            (event.start_ns / 1e9, event.end_ns / 1e9)
            for plane in planes
            for line in plane.lines
            for event in line.events
            if event.name == "ThunkExecutor::Execute"
        ]
    programs.sort(key=lambda program: program[0] - program[1])
    longest = programs[0][1] - programs[0][0]
    return sorted(program for program in programs if program[1] - program[0] > longest / 3)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=os.path.join(ROOT, "configs", "digits.py"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="starts with a warm cache (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        cold = seconds_to_first_step(arguments.config, cache)
        warm = [seconds_to_first_step(arguments.config, cache) for _ in range(arguments.rounds)]
    print(
        f"first step after {cold:.1f} s, {statistics.median(warm):.1f} s where it has been compiled before", flush=True
    )

    keep_freed_memory()  # as train.py
    config = runpy.run_path(arguments.config)["get_config"]()
    config = dataclasses.replace(
        config,
        num_epochs=arguments.epochs,
        eval_every_epochs=arguments.epochs,
        checkpoint_every_epochs=arguments.epochs,
    )
    steps = steps_of_run(config)
    parts = run_parts(config)
    if len(steps) != arguments.epochs * parts.steps_per_epoch:
        raise SystemExit(f"the profile has {len(steps)} steps of {arguments.epochs * parts.steps_per_epoch}")
    wall = steps[-1][1] - steps[0][0]
    inside = sum(end - start for start, end in steps)
    between = sorted(after[0] - before[1] for before, after in itertools.pairwise(steps))

    state, batch = parts.state, next(parts.loader.train_batches(0, config.step_size, range(1)))
    alone = []
    for _ in range(3 * parts.steps_per_epoch):
        start = time.perf_counter()
        state, metrics = parts.step(state, batch, jax.random.key(0))
        jax.block_until_ready((state, metrics))
        alone.append(time.perf_counter() - start)
    rate = len(steps) * config.step_size / wall
    rate_alone = config.step_size / statistics.median(alone[2:])
    print(
        f"{len(steps)} steps in {wall:.2f} s: {inside / wall:.1%} of it within the step; between two steps "
        f"{1e3 * statistics.median(between):.2f} ms, at most {1e3 * between[-1]:.1f}\n"
        f"{rate:.1f} images/s, the step alone {rate_alone:.1f}: {rate / rate_alone:.1%}\n"
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, JAX {jax.__version__}"
    )


if __name__ == "__main__":
    main()
