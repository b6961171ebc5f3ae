"""What train.py takes besides its steps: before the first one, and between them.

    python benchmarks/command.py [--config FILE] [--epochs N] [--rounds N] [--no-starts]

First it starts the command with an empty compilation cache and with the one that this leaves, and prints the seconds
until the first step has been reported. Then it trains N epochs, without an evaluation or a save but the last, and in
turn takes as many of the same steps alone, on one batch that lies ready: it prints the images per second of both, and
the ratio. At last it trains once more, waiting for each step, and prints the part of the time between the first step
and the last that passes within a step, and a profile of the rest.
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

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as train.py
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import jax  # noqa: E402

import train  # noqa: E402
from benchmarks.run_parts import RunParts, run_parts  # noqa: E402
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
    with tempfile.TemporaryDirectory() as workdir, contextlib.redirect_stdout(io.StringIO()):
        if train.train_and_evaluate(config, workdir):
            raise SystemExit("the run failed")
        lines = [line for line in read_metrics(os.path.join(workdir, "metrics.jsonl")) if line["kind"] == "train"]
    return statistics.harmonic_mean([line["images_per_second"] for line in lines[1:]])


def images_per_second_of_step(config: Config, parts: RunParts, batch: Any, steps: int) -> tuple[float, RunParts]:
    """Of so many steps on one batch, each waited for; and the parts with the state that they leave."""
    state = parts.state
    start = time.perf_counter()
    for _ in range(steps):
        state, metrics = parts.step(state, batch, jax.random.key(0))
        jax.block_until_ready((state, metrics))
    seconds = time.perf_counter() - start
    return config.step_size * steps / seconds, parts._replace(state=state)


@contextlib.contextmanager
def steps_waited_for(last: int, profile: cProfile.Profile) -> Iterator[list[tuple[float, float]]]:
    """Gives a list to which each step of train.py adds its start and end; `profile` sees what is between them."""
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

    jax.stages.Compiled.__call__ = timed  # type: ignore[method-assign]
    try:
        yield intervals
    finally:
        jax.stages.Compiled.__call__ = call  # type: ignore[method-assign]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=os.path.join(ROOT, "configs", "digits.py"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument(
        "--rounds", type=int, default=5, help="of starts with a warm cache, and of training (%(default)s)"
    )
    parser.add_argument("--no-starts", action="store_true", help="only the training")
    arguments = parser.parse_args()
    if not arguments.no_starts:
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
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)  # a run compiles but once
        parts = run_parts(config)
        batch = next(parts.loader.train_batches(0, config.step_size, range(1)))
        steps = arguments.epochs * parts.steps_per_epoch
        _, parts = images_per_second_of_step(config, parts, batch, 3)
        images_per_second_of_run(config)
        loop, alone = [], []
        for _ in range(arguments.rounds):
            loop.append(images_per_second_of_run(config))
            rate, parts = images_per_second_of_step(config, parts, batch, steps)
            alone.append(rate)
        ratios = sorted(a / b for a, b in zip(loop, alone, strict=True))
        print(
            f"in the loop {statistics.median(loop):.1f} images/s, the step alone {statistics.median(alone):.1f}: "
            f"{statistics.median(ratios):.1%}, the median of rounds from {ratios[0]:.1%} to {ratios[-1]:.1%}",
            flush=True,
        )
        profile = cProfile.Profile()
        with steps_waited_for(steps, profile) as intervals:
            images_per_second_of_run(config)
        within = sum(end - start for start, end in intervals[1:])
        share = within / (intervals[-1][1] - intervals[0][1])
        print(f"within a step {share:.1%} of the time from the first step to the last; of the rest, in seconds:")
        pstats.Stats(profile).sort_stats("cumulative").print_stats(15)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, JAX {jax.__version__}")


if __name__ == "__main__":
    main()
