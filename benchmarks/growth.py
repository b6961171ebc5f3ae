"""The growth of time and memory with the batch size, the size of the images and the depth.

    python benchmarks/growth.py [--sweeps NAME...] [--rounds N] [--seconds S]

Batch sizes from 1 to 256 at 32x32, training and inference; images from 32x32 to 512x512, one at a time; all depths at
32x32, training. Each cell runs in a process of its own with the code of benchmarks/throughput.py. Memory is the peak of
the process less its imports and the weights.
"""

import argparse
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from benchmarks.throughput import circumstances, find_platform, measure  # noqa: E402 - after the path
from benchmarks.throughput_cells import Cell, flops, parse_cell  # noqa: E402 - after the path

SWEEPS: dict[str, list[Cell]] = {
    "batch": [
        parse_cell(f"vgg16_bn-32-{mode}", batch) for mode in ("infer", "train") for batch in (1, 4, 16, 64, 128, 256)
    ],
    "size": [parse_cell("vgg16-224-infer", 1, size) for size in (32, 64, 128, 224, 256, 384, 512)],
    "depth": [parse_cell(f"vgg{depth}_bn-32-train", 64) for depth in (11, 13, 16, 19)],
}


def main() -> None:
    """Measure one cell after the other and print each as a line of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a burst (%(default)s)")
    parser.add_argument(
        "--product-size", type=int, default=2048, help="side of the matrices of the product (%(default)s)"
    )
    options = parser.parse_args()
    device = find_platform()
    print(
        "| network | images | batch | GFLOP an image | ms an image | GFLOP/s | of the matrix product | MiB | an image |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for cell in (cell for name in options.sweeps for cell in SWEEPS[name]):
        result = measure(cell, ["ours"], options.rounds, options.seconds, options.product_size)
        arm = result["arms"]["ours"]
        if "error" in arm:
            raise SystemExit(f"{cell}: {arm['error']}")
        memory = (arm["device_peak_bytes"] or arm["peak_bytes"] - arm["base_bytes"]) / 2**20
        network, _, mode = cell.name.split("-")[:3]
        print(
            f"| {network}, {'training' if mode == 'train' else 'inference'} | {cell.size}x{cell.size} | {cell.batch} | "
            f"{flops(cell) / 1e9:.2f} | {1e3 / arm['images_per_second']:.3g} | "
            f"{arm['images_per_second'] * flops(cell) / 1e9:.0f} | {arm['share_of_product']:.2f} | {memory:,.0f} | "
            f"{memory / cell.batch:.3g} |",
            flush=True,
        )
    about = circumstances(*device)
    print(f"\n{about['processor']}, {about['cores']} cores; JAX {about['versions']['jax']}; commit {about['commit']}")


if __name__ == "__main__":
    main()
