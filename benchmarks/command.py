"""The cost of train.py besides its steps: before the first step, and between steps.

    python benchmarks/command.py [--config FILE] [--epochs N] [--rounds N] [--no-starts]

Starts: run the command with an empty compilation cache and then with the filled one, and print the seconds until the
first step is reported. Loop: train N epochs with only the final evaluation and save, in turn with the same number of
steps alone on one batch that is in place, and print the images per second of both and their ratio. Profile: train once
more, wait for each step, and print the share of the time from the first step to the last that passes within steps, and
a profile of the rest.
"""

import argparse
import contextlib
import cProfile
import dataclasses
import io
import os
import platform
import pstats
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as in train.py
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import jax  # noqa: E402 - after the environment variable

from vgg_jax.config import Config  # noqa: E402 - after the path
from vgg_jax.runtime import keep_freed_memory  # noqa: E402 - after the path
from vgg_jax.training.loop import build, train_and_evaluate  # noqa: E402 - after the path
from vgg_jax.training.metric_writer import read_metrics  # noqa: E402 - after the path
from vgg_jax.training.run import Run  # noqa: E402 - after the path
from vgg_jax.training.run_directory import resolve_dtype  # noqa: E402 - after the path
from vgg_jax.training.sharding import make_mesh  # noqa: E402 - after the path
from vgg_jax.training.state import TrainState  # noqa: E402 - after the path

FIRST_STEP = re.compile(rb"\bstep 1/")


def seconds_to_first_step(config_file: str, cache: str) -> float:
    """Return the seconds from the start of the command to the line of its first step, and kill the command."""
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
        raise SystemExit("the command ended before its first step; run it alone to see its error")
    return seconds


def images_per_second_of_run(config: Config) -> float:
    """Return the rate of the whole loop after its first report, when all is compiled and batches are read ahead."""
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()):
        if train_and_evaluate(config, workdir):
            raise SystemExit("the run failed")
        lines = [line for line in read_metrics(os.path.join(workdir, "metrics.jsonl")) if line["kind"] == "train"]
    return statistics.harmonic_mean([line["images_per_second"] for line in lines[1:]])


def images_per_second_of_step(run: Run, state: TrainState, batch: Any, steps: int) -> tuple[float, TrainState]:
    """Return the rate of steps on one batch, each waited for, and the state after them."""
    start = time.perf_counter()
    for _ in range(steps):
        state, metrics = run.train_step(state, batch, run.step_key)
        jax.block_until_ready((state, metrics))
    seconds = time.perf_counter() - start
    return run.config.step_size * steps / seconds, state


@contextlib.contextmanager
def steps_waited_for(last: int, profile: cProfile.Profile) -> Iterator[list[tuple[float, float]]]:
    """Yield a list that gets the start and the end of each step of train.py; profile what lies between steps."""
    intervals: list[tuple[float, float]] = []
    call = jax.stages.Compiled.__call__

    def timed(step: jax.stages.Compiled, *arguments: Any) -> Any:
        if len(intervals) == last:  # the evaluation
            return call(step, *arguments)
        profile.disable()
        start = time.perf_counter()
        result = jax.block_until_ready(call(step, *arguments))
        intervals.append((start, time.perf_counter()))
        if len(intervals) < last:
            profile.enable()
        return result

    jax.stages.Compiled.__call__ = timed  # type: ignore[method-assign]  # for the time of the context
    try:
        yield intervals
    finally:
        jax.stages.Compiled.__call__ = call  # type: ignore[method-assign]  # the method itself


def time_loop(config: Config, rounds: int) -> int:
    """Print the rates of the loop and of its step alone, measured in turn; return the steps of a run."""
    run = build(config, make_mesh())
    state = run.new_state()
    batch = next(run.train_loader.train_batches(0, config.step_size, range(1)))
    _, state = images_per_second_of_step(run, state, batch, 3)
    images_per_second_of_run(config)
    in_loop, alone = [], []
    for _ in range(rounds):
        in_loop.append(images_per_second_of_run(config))
        rate, state = images_per_second_of_step(run, state, batch, run.num_steps)
        alone.append(rate)
    ratios = sorted(a / b for a, b in zip(in_loop, alone, strict=True))
    print(
        f"in the loop {statistics.median(in_loop):.1f} images/s, the step alone {statistics.median(alone):.1f}: "
        f"{statistics.median(ratios):.1%}, the median of rounds from {ratios[0]:.1%} to {ratios[-1]:.1%}",
        flush=True,
    )
    return run.num_steps


def profile_loop(config: Config, steps: int) -> None:
    """Print the share of the time that passes within steps, and a profile of the rest."""
    profile = cProfile.Profile()
    with steps_waited_for(steps, profile) as intervals:
        images_per_second_of_run(config)
    within = sum(end - start for start, end in intervals[1:])
    share = within / (intervals[-1][1] - intervals[0][1])
    print(f"within a step {share:.1%} of the time from the first step to the last; the rest in seconds:")
    pstats.Stats(profile).sort_stats("cumulative").print_stats(15)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=os.path.join(ROOT, "configs", "digits.py"))
    parser.add_argument("--epochs", type=int, default=2, help="epochs of a training (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="starts with a filled cache, trainings (%(default)s)")
    parser.add_argument("--no-starts", action="store_true", help="only the training")
    arguments = parser.parse_args()
    if not arguments.no_starts:
        with tempfile.TemporaryDirectory() as cache:
            cold = seconds_to_first_step(arguments.config, cache)
            warm = statistics.median(seconds_to_first_step(arguments.config, cache) for _ in range(arguments.rounds))
        print(f"first step after {cold:.1f} s, {warm:.1f} s with a filled compilation cache", flush=True)

    keep_freed_memory()  # as in train.py
    config = resolve_dtype(runpy.run_path(arguments.config)["get_config"]())
    config = dataclasses.replace(
        config,
        num_epochs=arguments.epochs,
        eval_every_epochs=arguments.epochs,
        checkpoint_every_epochs=arguments.epochs,
    )
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)  # so that runs compile only once
        profile_loop(config, time_loop(config, arguments.rounds))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, JAX {jax.__version__}")


if __name__ == "__main__":
    main()
