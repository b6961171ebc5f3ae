"""What checkpoints cost: epochs with a save beside epochs without, in turn in one process.

    python benchmarks/checkpoints.py [--rounds N] [--config FILE] [--steps-per-epoch N]

Where an epoch saves, it does so after its first step, so that all of the save falls into an epoch, as all but a run's
last do. Epochs before those that count compile, and fill the directory. Prints the median time of an epoch with a save
(integrity checks and all), of one without, and of what of it the loop waits in `save`. What a save takes does not grow
with the epoch: the digits' 22 steps are few, CIFAR-10's are 391.
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

from benchmarks.run_parts import run_parts  # noqa: E402
from vgg_jax.allocator import keep_freed_memory  # noqa: E402
from vgg_jax.checkpoint import Checkpoints  # noqa: E402
from vgg_jax.tally import Tally  # noqa: E402
from vgg_jax.training import checked_tensors  # noqa: E402


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--config", default=os.path.join(ROOT, "configs", "digits.py"))
    parser.add_argument("--steps-per-epoch", type=int, help="by default those of the data set")
    arguments = parser.parse_args()
    keep_freed_memory()  # as train.py
    config = runpy.run_path(arguments.config)["get_config"]()

    parts = run_parts(config)
    state, step, loader = parts.state, parts.step, parts.loader
    steps_per_epoch = arguments.steps_per_epoch or parts.steps_per_epoch

    def epoch(state, checkpoints):
        """An epoch from this state on; the state after it, its seconds, and those in `save`."""
        start, waited = time.perf_counter(), 0.0
        first = int(state.step)
        tally = Tally(checked_tensors(state), max_skipped=10)
        steps = range(first, first + steps_per_epoch)
        for i, batch in enumerate(loader.train_batches(0, config.step_size, steps), 1):
            state, metrics = step(state, batch, jax.random.key(1))
            tally.add(first + i, metrics)
            if checkpoints:
                checkpoints.check()
                if i == 1:
                    progress = tally.state()  # waits for the step
                    before = time.perf_counter()
                    checkpoints.save(state, None, progress)
                    waited += time.perf_counter() - before
        jax.block_until_ready(state)
        return state, time.perf_counter() - start, waited

    times: dict[bool, list[float]] = {False: [], True: []}
    waits = []
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(directory)
        for i in range(arguments.rounds + 1):
            for saves in (False, True) if i % 2 else (True, False):
                state, seconds, waited = epoch(state, checkpoints if saves else None)
                if i == 0:
                    continue  # it compiles, and fills the directory
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
