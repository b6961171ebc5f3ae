"""The cost of checkpoints: epochs with a save and epochs without, in turn in one process.

    python benchmarks/checkpoints.py [--rounds N] [--config FILE] [--steps-per-epoch N]

An epoch saves after its first step, so that the whole save falls into the epoch, as in a run. Two first epochs compile
and fill the directory, and do not count. Prints the median time of an epoch with a save (and its integrity checks), of
an epoch without, and the share that the loop waits in `save`. The cost of a save does not grow with the epoch: the
digits have only 22 steps, CIFAR-10 has 391.
"""

import argparse
import os
import platform
import runpy
import statistics
import sys
import tempfile
import time

import jax

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from vgg_jax.runtime import keep_freed_memory  # noqa: E402 - after the path
from vgg_jax.training.checkpoints import Checkpoints  # noqa: E402 - after the path
from vgg_jax.training.loop import build  # noqa: E402 - after the path
from vgg_jax.training.metrics import MetricAverages  # noqa: E402 - after the path
from vgg_jax.training.run import Run  # noqa: E402 - after the path
from vgg_jax.training.run_directory import resolve_dtype  # noqa: E402 - after the path
from vgg_jax.training.sharding import make_mesh  # noqa: E402 - after the path
from vgg_jax.training.state import TrainState  # noqa: E402 - after the path
from vgg_jax.training.step import checked_tensors  # noqa: E402 - after the path


def train_epoch(
    run: Run, state: TrainState, steps_per_epoch: int, checkpoints: Checkpoints | None
) -> tuple[TrainState, float, float]:
    """Train an epoch; return the state after it, its seconds, and the seconds in `save`."""
    start, waited = time.perf_counter(), 0.0
    first = int(state.step)
    averages = MetricAverages(checked_tensors(state), max_skipped=10)
    steps = range(first, first + steps_per_epoch)
    for i, batch in enumerate(run.train_loader.train_batches(0, run.config.step_size, steps), 1):
        state, metrics = run.train_step(state, batch, run.step_key)
        averages.add(first + i, metrics)
        if checkpoints:
            checkpoints.check()
            if i == 1:
                progress = averages.state()  # waits for the step
                before = time.perf_counter()
                checkpoints.save(state, None, progress)
                waited += time.perf_counter() - before
    jax.block_until_ready(state)
    return state, time.perf_counter() - start, waited


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="pairs of epochs (%(default)s)")
    parser.add_argument("--config", default=os.path.join(ROOT, "configs", "digits.py"))
    parser.add_argument("--steps-per-epoch", type=int, help="by default those of the data set")
    arguments = parser.parse_args()
    keep_freed_memory()  # as in train.py
    run = build(resolve_dtype(runpy.run_path(arguments.config)["get_config"]()), make_mesh())
    state, steps_per_epoch = run.new_state(), arguments.steps_per_epoch or run.steps_per_epoch

    times: dict[bool, list[float]] = {False: [], True: []}
    waits = []
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(directory)
        for i in range(arguments.rounds + 1):
            for saves in (False, True) if i % 2 else (True, False):
                state, seconds, waited = train_epoch(run, state, steps_per_epoch, checkpoints if saves else None)
                if i == 0:
                    continue  # this round compiles and fills the directory
                times[saves].append(seconds)
                waits += [waited] * saves
                print(f"round {i}: {'with' if saves else 'without'} {seconds:.2f} s", flush=True)
        checkpoints.close()
    without, with_saves = (statistics.median(times[saves]) for saves in (False, True))
    size = sum(a.nbytes for a in jax.tree.leaves((state.params, state.batch_stats, state.opt_state)))
    ratios = [a / b for a, b in zip(times[True], times[False], strict=True)]
    print(
        f"{platform.processor() or platform.machine()}, JAX {jax.__version__}, {jax.device_count()} device(s); "
        f"{size / 1e6:.0f} MB a checkpoint, {steps_per_epoch} steps an epoch:\n"
        f"without {without:.2f} s, with {with_saves:.2f} s: {with_saves / without - 1:+.1%} "
        f"(in pairs: median {statistics.median(ratios) - 1:+.1%}, {min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%}); "
        f"in save {statistics.median(waits) / with_saves:.1%}"
    )


if __name__ == "__main__":
    main()
