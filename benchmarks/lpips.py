"""The time of LPIPS with its gradient, beside the package `lpips` on PyTorch, in one process and in turn.

    python benchmarks/lpips.py [--cases SIDE:BATCH ...] [--rounds N] [--threads N]

Each round calls every arm once, in float32: the distances of a batch of pairs, and the gradient of their mean by the
first images. The arms are

  torch                LPIPS(net="vgg") of the package
  torch_channels_last  the same with the memory format channels_last
  ours                 `vgg_jax.features.lpips` inside `jit`
  ours_cached          the same with activations of the second images from `lpips_features`, computed before

All have the same random trunk, and the script compares their distances first. Prints medians of seconds and of
processor seconds, and medians over the rounds of the ratios: of the fastest arm of PyTorch to ours, and of ours to
ours_cached. Needs torch, torchvision and lpips.
"""

import argparse
import copy
import functools
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# The folder of this file must not stay on the path: in it, the name `lpips` means this file.
sys.path[:] = [ROOT, *(folder for folder in sys.path if folder != os.path.join(ROOT, "benchmarks"))]

from benchmarks.pytorch import import_torchvision  # noqa: E402 - after the path
from vgg_jax import VGG, from_torch  # noqa: E402 - after the path
from vgg_jax.features import lpips, lpips_features  # noqa: E402 - after the path
from vgg_jax.runtime import keep_freed_memory  # noqa: E402 - after the path

CASES = ("64:16", "256:4")
RANGE = (-1, 1)
TORCH_ARMS = ("torch", "torch_channels_last")

Arm = Callable[[], tuple[np.ndarray, Any]]  # returns the distances (N,) and the gradient


class Times(NamedTuple):
    """The seconds of one call."""

    wall: float
    processor: float  # of all threads


def parse_case(text: str) -> tuple[int, int]:
    """Return the side of the images and the batch size that SIDE:BATCH names."""
    side, batch = text.split(":")
    return int(side), int(batch)


def make_pairs(side: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two batches (N, side, side, 3) in [-1, 1]; the second is the first with noise."""
    random = np.random.default_rng(0)
    first = random.uniform(*RANGE, (batch, side, side, 3)).astype(np.float32)
    noise = random.normal(0, 0.2, first.shape).astype(np.float32)
    return first, np.clip(first + noise, *RANGE)


def torch_metric(threads: int) -> Any:
    """Return the package's metric with a random trunk, whose parameters need no gradients."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    import_torchvision()
    import lpips as package

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package passes arguments that torchvision calls deprecated
        metric = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    return metric.requires_grad_(False)


def trunk_of(metric: Any) -> tuple[VGG, Any]:
    """Return the trunk of the package's metric as a network of vgg_jax, and its variables."""
    state = {
        ".".join(("features", *name.split(".")[2:])): x for name, x in metric.state_dict().items() if "net." in name
    }
    return from_torch(state)


def torch_arm(metric: Any, channels_last: bool, first: np.ndarray, second: np.ndarray) -> Arm:
    """Return an arm of PyTorch, with a copy of the metric in its memory format."""
    import torch

    layout = torch.channels_last if channels_last else torch.contiguous_format
    images, others = (torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(memory_format=layout) for x in (first, second))
    images.requires_grad_()
    own = copy.deepcopy(metric).to(memory_format=layout)

    def call() -> tuple[np.ndarray, Any]:
        distances = own(images, others)[:, 0, 0, 0]
        return distances.detach().numpy(), torch.autograd.grad(distances.mean(), images)[0]

    return call


def jax_arms(model: VGG, variables: Any, first: np.ndarray, second: np.ndarray) -> dict[str, Arm]:
    """Return our arms, compiled."""
    features = jax.jit(functools.partial(lpips_features, model, input_range=RANGE))

    @jax.jit
    def program(variables: Any, images: jax.Array, others: Any) -> Any:
        def loss(images: jax.Array) -> tuple[jax.Array, jax.Array]:
            distances = lpips(model, variables, images, others, input_range=RANGE)
            return distances.mean(), distances

        (_, distances), gradient = jax.value_and_grad(loss, has_aux=True)(images)
        return distances, gradient

    images, others = jax.device_put(first), jax.device_put(second)
    targets = {"ours": others, "ours_cached": jax.block_until_ready(features(variables, others))}

    def call(target: Any) -> tuple[np.ndarray, Any]:
        distances, gradient = jax.block_until_ready(program(variables, images, target))
        return np.asarray(distances), gradient

    return {name: functools.partial(call, target) for name, target in targets.items()}


def make_arms(side: int, batch: int, threads: int) -> dict[str, Arm]:
    """Return all arms of a case, which have run once and agree; raise AssertionError if their distances differ."""
    metric = torch_metric(threads)
    pairs = make_pairs(side, batch)
    arms = {name: torch_arm(metric, "last" in name, *pairs) for name in TORCH_ARMS}
    arms |= jax_arms(*trunk_of(metric), *pairs)
    distances = {name: arm()[0] for name, arm in arms.items()}
    for name, found in distances.items():
        np.testing.assert_allclose(found, distances["torch"], rtol=1e-4, err_msg=name)
    return arms


def measure(arms: dict[str, Arm], rounds: int) -> list[dict[str, Times]]:
    """Return the times of every arm in each round; the order of the arms alternates."""
    results = []
    for i in range(rounds):
        times = {}
        for name in list(arms)[:: 1 if i % 2 == 0 else -1]:
            wall, processor = time.perf_counter(), time.process_time()
            arms[name]()
            times[name] = Times(time.perf_counter() - wall, time.process_time() - processor)
        results.append(times)
    return results


def median(results: list[dict[str, Times]], name: str, clock: int) -> float:
    """Return the median seconds of an arm by one clock, an index of Times."""
    return statistics.median(times[name][clock] for times in results)


def ratio(results: list[dict[str, Times]], slow: str, fast: str, clock: int) -> float:
    """Return the median over the rounds of the ratio of two arms."""
    return statistics.median(times[slow][clock] / times[fast][clock] for times in results)


def row(case: str, results: list[dict[str, Times]]) -> str:
    """Return the row of a case. The best arm of PyTorch is that with the smallest median, of each clock."""
    cells = [case]
    for clock in range(len(Times._fields)):
        best = min(TORCH_ARMS, key=lambda name: median(results, name, clock))
        seconds = [f"{median(results, name, clock):.3f}" for name in (best, "ours", "ours_cached")]
        ratios = [f"{ratio(results, *pair, clock):.2f}" for pair in ((best, "ours"), ("ours", "ours_cached"))]
        cells += [f"{seconds[0]} ({best})", *seconds[1:], *ratios]
    return f"| {' | '.join(cells)} |"


def header() -> str:
    """Return the head of the table."""
    names = ["SIDE:BATCH"]
    for clock in ("s", "processor s"):
        names += [f"{name}, {clock}" for name in ("PyTorch", "ours", "ours cached")]
        names += [f"PyTorch / ours, {clock}", f"ours / cached, {clock}"]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def main(arguments: list[str] | None = None) -> None:
    """Measure the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="SIDE:BATCH")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (%(default)s)")
    options = parser.parse_args(arguments)
    keep_freed_memory(one_arena=True)  # for both sides
    print(f"JAX {jax.__version__}, PyTorch {version('torch')}, {os.cpu_count()} processors\n")
    print(header(), flush=True)
    for case in options.cases:
        print(row(case, measure(make_arms(*parse_case(case), options.threads), options.rounds)), flush=True)


if __name__ == "__main__":
    main()
