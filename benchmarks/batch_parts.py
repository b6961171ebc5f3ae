"""Evaluation of the first stages in parts of the batch, beside the whole batch: python benchmarks/batch_parts.py

Prints a table of images per second and of temporary memory for each cell NETWORK:SIDE:BATCH. Both programs run in turn
in one process on one device; medians.
"""

import argparse
import os
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.variants import parse_case, temporary
from vgg_jax.ops import batch_parts

LIMITS = {"whole": 2**62, "parts": batch_parts.LARGEST_MAP}


def programs(cell: str) -> tuple[dict[str, Any], tuple[Any, jax.Array]]:
    """Return the compiled programs of a cell by name, and their arguments."""
    case = parse_case(cell, "float32")
    shape = (case.batch, case.side, case.side, 3)
    images = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    variables = jax.jit(case.model.init)(jax.random.key(0), images[:1])
    compiled = {}
    for name, limit in LIMITS.items():
        batch_parts.LARGEST_MAP = limit
        apply = jax.jit(lambda variables, images: case.model.apply(variables, images))  # traced anew
        compiled[name] = apply.lower(variables, images).compile()
    return compiled, (variables, images)


def main() -> None:
    """Print a row for each cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cells = ["vgg16_bn:32:64", "vgg16_bn:32:512", "vgg16_bn:64:64", "vgg16:224:8", "vgg16:224:32"]
    parser.add_argument("--cells", nargs="+", default=cells)
    parser.add_argument("--rounds", type=int, default=9, help="%(default)s")
    options = parser.parse_args()
    print("| cell | whole: images/s, MiB | parts: images/s, MiB | parts over whole |\n|---|---|---|---|")
    for cell in options.cells:
        compiled, arguments = programs(cell)
        seconds: dict[str, list[float]] = {name: [] for name in compiled}
        for i in range(options.rounds + 1):
            for name, program in compiled.items():
                start = time.perf_counter()
                jax.block_until_ready(program(*arguments))
                seconds[name] += [time.perf_counter() - start] if i else []
        rates = {name: len(arguments[1]) / statistics.median(values) for name, values in seconds.items()}
        columns = [f"{rate:,.4g}, {temporary(compiled[name]):,.0f}" for name, rate in rates.items()]
        print(f"| {cell} | {' | '.join(columns)} | {rates['parts'] / rates['whole']:.2f} |", flush=True)
    print(f"\n{jax.devices()[0].device_kind}, {os.cpu_count()} cores, JAX {jax.__version__}")


if __name__ == "__main__":
    main()
