"""Other ways to compute an optimized network, in turn with the one taken: python benchmarks/inference_variants.py PART

products  the product of all patches of one map of 4x4 (16 rows) with the kernel from 512 to 512 channels: as one matrix
          product, in parts of the sum, in parts of the columns, and transposed. Six kernels in turn, so that each is
          read from memory, as in a network. A read alone is the floor.
network   VGG-16 at 224x224, one image, with other methods of some layers, and with other bands.

The command prints a table: milliseconds, and the median over the rounds of the ratio to the first row.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as in the commands

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax import VGG, optimize_for_inference
from vgg_jax.evaluation.optimized import COMPILER_OPTIONS
from vgg_jax.ops import inference_layers
from vgg_jax.runtime import keep_freed_memory
from vgg_jax.weights import inference

Run = Callable[[], Any]
KERNELS = 6  # 54 MiB, more than the cache

# By the name: the maps whose method is another one, (side, channels of the input) to method; the bytes of the largest
# map that is computed at once; and those of a band.
NETWORKS: dict[str, tuple[dict[tuple[int, int], str], int, int]] = {
    "as it is": ({}, 2**24, 2**22),
    "conv1_2 by F(4x4)": ({(224, 64): "winograd4"}, 2**24, 2**22),
    "stage 2 by F(4x4)": ({(112, 64): "winograd4", (112, 128): "winograd4"}, 2**24, 2**22),
    "conv1_1 by im2col": ({(224, 3): "im2col"}, 2**24, 2**22),
    "conv1_2 in bands of 4 MiB": ({}, 2**23, 2**22),
    "conv1_2 in bands of 2 MiB": ({}, 2**23, 2**21),
    "conv1_2 in bands of 1 MiB": ({}, 2**23, 2**20),
}


def in_parts_of_the_sum(parts: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return the product of x (N, K) and w (K, D) as one batched product, then a sum."""

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        rows = x.reshape(len(x), parts, -1).swapaxes(0, 1)
        return jnp.matmul(rows, w.reshape(parts, -1, w.shape[1])).sum(0)

    return product


def in_parts_of_the_columns(parts: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return the product with w as if it had the shape (parts, K, D / parts) in memory."""
    return lambda x, w: jnp.matmul(x[None], w.reshape(parts, w.shape[0], -1))


PRODUCTS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "one product": jnp.matmul,
    **{f"sum in {parts} parts": in_parts_of_the_sum(parts) for parts in (2, 9, 18, 36)},
    **{f"columns in {parts} parts": in_parts_of_the_columns(parts) for parts in (2, 4, 16)},
    "transposed kernel": lambda x, w: jnp.matmul(w.reshape(w.shape[1], -1), x.T),
    "read alone": lambda x, w: jnp.sum(w.reshape(16, -1, w.shape[1]), 1),
}


def products(rows: int = 16, inner: int = 4608, columns: int = 512) -> dict[str, Run]:
    """Return the calls of the variants of a product."""
    random = np.random.default_rng(0)
    x = jax.device_put(random.standard_normal((rows, inner), np.float32))
    kernels = [jax.device_put(random.standard_normal((inner, columns), np.float32)) for _ in range(KERNELS)]

    def call(function: Callable[[jax.Array, jax.Array], jax.Array]) -> Run:
        program = jax.jit(lambda x, ws: [function(x, w) for w in ws], compiler_options=COMPILER_OPTIONS)
        return lambda: jax.block_until_ready(program(x, kernels))

    return {name: call(function) for name, function in PRODUCTS.items()}


def networks(side: int = 224) -> dict[str, Run]:
    """Return the calls of the variants of the network."""
    model = VGG(depth=16)
    images = jax.random.normal(jax.random.key(1), (1, side, side, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    return {name: network(model, variables, images, *variant) for name, variant in NETWORKS.items()}


def network(model: VGG, variables: Any, images: jax.Array, methods: Mapping[Any, str], largest: int, band: int) -> Run:
    """Return the call of a network with some other methods, and maps in other bands."""
    chosen = inference_layers.choose_method

    def method(shape: tuple[int, ...], features: int) -> str:
        return methods.get((shape[1], shape[3])) or chosen(shape, features)

    with (
        mock.patch.object(inference, "choose_method", method),
        mock.patch.object(inference_layers, "LARGEST_MAP", largest),
        mock.patch.object(inference_layers, "LARGEST_BAND", band),
    ):
        optimized, replaced = optimize_for_inference(model, variables, images.shape)
        jax.clear_caches()  # of traces with other bands
        program = jax.jit(optimized.apply).lower(replaced, images).compile(COMPILER_OPTIONS)
    return lambda: program(replaced, images).block_until_ready()


def report(calls: Mapping[str, Run], rounds: int, of_each: int) -> None:
    """Time the calls in turn, and print the table."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start) / of_each)
    first = next(iter(times.values()))
    print("| variant | ms | ratio |\n|---|---|---|")
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, first, strict=True))
        print(f"| {name} | {statistics.median(values):.3g} | {ratio:.2f} |", flush=True)


def main() -> None:
    """Print the table of a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["products", "network"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels, to try the command")
    options = parser.parse_args()
    keep_freed_memory()
    calls = products() if options.part == "products" else networks(options.size)
    report(calls, options.rounds, KERNELS if options.part == "products" else 1)


if __name__ == "__main__":
    main()
