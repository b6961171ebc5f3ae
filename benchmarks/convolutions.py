"""The 3x3 convolutions of VGG-16 by each method on a CPU: python benchmarks/convolutions.py [--cases SIDE:BATCH...]

Each layer shape of a case runs forward and backward (the gradients of map, kernel and bias; for images, of kernel and
bias) by

  xla         XLA's convolution
  im2col      one matrix product of nine shifted copies
  winograd2   F(2x2, 3x3): products of 16 points of tiles of 4x4 pixels, over the whole map
  winograd4   F(4x4, 3x3): products of 36 points of tiles of 6x6 pixels, over the whole map
  bands       F(4x4, 3x3), four rows of the map at a time: the method of vgg_jax
  karatsuba   Karatsuba's algorithm, on maps of 2x2 only
  chosen      what vgg_jax chooses for the shape

The programs of a shape run in turn; medians, in GFLOP/s of the direct convolution. `--parts error` compares float32
with float64 for one image of each shape, and for several sizes of tiles and sets of points. With --json, the figures of
this call replace those of the same case and part in the file.
"""

import argparse
import functools
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from benchmarks.throughput import circumstances
from vgg_jax.model import TABLE_1
from vgg_jax.ops import methods
from vgg_jax.ops.bilinear import conv_by_method, conv_by_xla
from vgg_jax.ops.conv3x3 import conv3x3
from vgg_jax.runtime import apply_defaults

POINTS = {
    "F(2x2): 0, 1, -1": (2, (0.0, 1.0, -1.0)),
    "F(4x4): 0, 1, -1, 2, -2": (4, (0.0, 1.0, -1.0, 2.0, -2.0)),
    "F(4x4): 0, +-sqrt(1/2), +-sqrt(2)": (4, (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))),
    "F(6x6): 0, 1, -1, 2, -2, 1/2, -1/2": (6, (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)),
}
PARTS = ("forward", "backward", "error")
PRODUCT = 2048  # side of the matrices whose product gives the reference rate


class Shape(NamedTuple):
    """A convolution of maps (batch, side, side, channels) to `features` channels."""

    batch: int
    side: int
    channels: int
    features: int

    @property
    def flops(self) -> int:
        """Return the operations of the direct convolution forward."""
        return 2 * 9 * self.batch * self.side**2 * self.channels * self.features

    @property
    def is_first(self) -> bool:
        """Return whether the maps are images, whose gradient nobody needs."""
        return self.channels == 3

    @property
    def name(self) -> str:
        """Return the shape as text."""
        return f"{self.side}x{self.side}, {self.channels} to {self.features}"


def shapes(case: str) -> list[Shape]:
    """Return the different convolutions of VGG-16 for a case SIDE:BATCH, in the order of the network."""
    side, batch = (int(number) for number in case.split(":"))
    channels, found = 3, []
    for stage, widths in enumerate(TABLE_1["D"]):
        for features in widths:
            found.append(Shape(batch, side // 2**stage, channels, features))
            channels = features
    return list(dict.fromkeys(found))


def matrices(rows: int, points: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return B^T, G and A^T of F(rows x rows, 3x3), as `vgg_jax.ops.winograd` computes them for four rows."""

    def powers(count: int) -> np.ndarray:
        return np.array([[p**i for i in range(count)] for p in points] + [[0.0] * (count - 1) + [1.0]])

    scale = np.array([math.prod(p - q for q in points if q != p) for p in points] + [1.0])
    b = np.linalg.inv(powers(rows + 2)) * scale
    return np.where(abs(b) > 1e-9, b, 0).T, powers(3) / scale[:, None], powers(rows).T


def by_tiles(x: jax.Array, kernel: jax.Array, bias: jax.Array, rows: int, points: tuple[float, ...]) -> jax.Array:
    """Return the convolution by Winograd's algorithm over the whole map at once, for tiles of any size."""
    b, g, a = matrices(rows, points)
    n, height, width, channels = x.shape
    size, tiles = rows + 2, [-(-length // rows) for length in (height, width)]
    spare = [rows * count - length for count, length in zip(tiles, (height, width), strict=True)]
    x = jnp.pad(x, ((0, 0), (1, 1 + spare[0]), (1, 1 + spare[1]), (0, 0)))
    transform = jnp.asarray(np.einsum("ri,sj->srij", g, g).reshape(size * size, 9), x.dtype)  # as in `data`
    kernels = jnp.tensordot(transform, kernel.reshape(9, channels, -1), 1)

    def along(x: jax.Array, axis: int, matrix: np.ndarray, count: int) -> jax.Array:
        parts = [lax.slice_in_dim(x, i, i + rows * (count - 1) + 1, rows, axis) for i in range(size)]
        return weighted(matrix, parts, 0)

    data = along(along(x, 1, b, tiles[0]), 3, b, tiles[1])  # (column, row, N, tiles, tiles, C)
    products = jnp.matmul(data.reshape(size * size, -1, channels), kernels.reshape(size * size, channels, -1))
    products = lax.optimization_barrier(products.reshape(*data.shape[:-1], -1))
    y = weighted(a, list(products), 4).reshape(size, n, tiles[0], tiles[1] * rows, -1)
    y = weighted(a, list(y), 2).reshape(n, rows * tiles[0], rows * tiles[1], -1)
    return y[:, :height, :width] + bias


def weighted(matrix: np.ndarray, arrays: list[jax.Array], axis: int) -> jax.Array:
    """Return for each row of the matrix the sum of the arrays weighted by it, stacked along a new axis."""
    sums: list[Any] = [sum(float(w) * array for w, array in zip(row, arrays, strict=True) if w) for row in matrix]
    stacked: jax.Array = lax.optimization_barrier(jnp.stack(sums, axis))
    return stacked


Convolution = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def arms(shape: Shape) -> dict[str, Convolution]:
    """Return the methods for a shape by name."""
    if shape.side <= 2:
        return {"xla": conv_by_xla, "karatsuba": conv3x3}
    found: dict[str, Convolution] = {
        "xla": conv_by_xla,
        "im2col": functools.partial(conv_by_method, method="im2col"),
        "winograd2": functools.partial(by_tiles, rows=2, points=POINTS["F(2x2): 0, 1, -1"][1]),
        "winograd4": functools.partial(conv_by_method, method="winograd"),
        "bands": functools.partial(conv_by_method, method="winograd"),
        "chosen": conv3x3,
    }
    return found


def arguments(shape: Shape, dtype: Any = np.float32) -> tuple[jax.Array, ...]:
    """Return maps after a ReLU, a kernel, a bias and a gradient of the output."""
    draw = np.random.default_rng(0)
    x = np.maximum(draw.standard_normal((shape.batch, shape.side, shape.side, shape.channels)), 0)
    kernel = draw.standard_normal((3, 3, shape.channels, shape.features)) * (2 / (9 * shape.channels)) ** 0.5
    dy = draw.standard_normal((*x.shape[:3], shape.features))
    return tuple(jnp.asarray(array, dtype) for array in (x, kernel, np.zeros(shape.features), dy))


def program(shape: Shape, name: str, method: Convolution, part: str, values: tuple[jax.Array, ...]) -> Any:
    """Return the compiled program of a method; backward, it computes the gradients that training needs."""

    def forward(x: jax.Array, kernel: jax.Array, bias: jax.Array, dy: jax.Array) -> jax.Array:
        return method(x, kernel, bias)

    def backward(x: jax.Array, kernel: jax.Array, bias: jax.Array, dy: jax.Array) -> Any:
        if shape.is_first:
            return jax.vjp(functools.partial(method, x), kernel, bias)[1](dy)
        return jax.vjp(method, x, kernel, bias)[1](dy)

    limit = methods.SMALLEST_BAND
    methods.SMALLEST_BAND = 2**62 if name == "winograd4" else limit
    try:
        return jax.jit(forward if part == "forward" else backward).lower(*values).compile()
    finally:
        methods.SMALLEST_BAND = limit


def seconds_of(programs: dict[str, Any], values: tuple[Any, ...], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round of each program; they run in turn after one call that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(rounds + 1):
        for name, compiled in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(*values))
            seconds[name] += [time.perf_counter() - start] if i else []
    return seconds


def rounded(value: float) -> float:
    """Return a figure with four digits."""
    return float(f"{value:.4g}")


def product_rate(rounds: int) -> float:
    """Return the GFLOP/s of a large matrix product of float32."""
    a = jnp.ones((PRODUCT, PRODUCT))
    compiled = jax.jit(jnp.matmul).lower(a, a).compile()
    return 2 * PRODUCT**3 / statistics.median(seconds_of({"product": compiled}, (a, a), rounds)["product"]) / 1e9


def speeds(case: str, part: str, rounds: int) -> dict[str, Any]:
    """Return the rates of all shapes of a case, and print a row for each."""
    found: dict[str, Any] = {"product_gflops": rounded(product_rate(max(rounds, 1))), "layers": []}
    for shape in shapes(case):
        values = arguments(shape)
        programs = {name: program(shape, name, method, part, values) for name, method in arms(shape).items()}
        work = shape.flops * (2 if part == "backward" and not shape.is_first else 1) / 1e9
        seconds = seconds_of(programs, values, max(rounds, 1))
        rates = {
            name: {
                "gflops": rounded(work / statistics.median(times)),
                "range": [rounded(work / max(times)), rounded(work / min(times))],
            }
            for name, times in seconds.items()
        }
        found["layers"].append({"shape": shape._asdict(), "methods": rates})
        shown = "  ".join(f"{name} {rate['gflops']:.4g}" for name, rate in rates.items())
        print(f"{case} {part}  {shape.name}  {shown}", flush=True)
    return found


def errors(case: str) -> dict[str, Any]:
    """Return the largest error of each method and of each set of points over the largest output, for one image."""
    found: dict[str, Any] = {"layers": []}
    for shape in (shape._replace(batch=1) for shape in shapes(case)):
        with jax.enable_x64(True):
            expected = np.asarray(jax.jit(conv_by_xla)(*arguments(shape, np.float64)[:3]))
        methods_of = {name: method for name, method in arms(shape).items() if name not in ("chosen", "winograd4")}
        methods_of = {name: method for name, method in methods_of.items() if name != "winograd2"}
        if shape.side > 2:
            for name, (rows, points) in POINTS.items():
                methods_of[name] = functools.partial(by_tiles, rows=rows, points=points)
        row = {}
        for name, method in methods_of.items():
            actual = np.asarray(jax.jit(method)(*arguments(shape)[:3]), np.float64)
            row[name] = rounded(abs(actual - expected).max() / abs(expected).max())
        found["layers"].append({"shape": shape._asdict(), "errors": row})
        shown = "  ".join(f"{name} {error:.1e}" for name, error in row.items())
        print(f"{case} error  {shape.name}  {shown}", flush=True)
    return found


def save(path: str, case: str, part: str, found: dict[str, Any]) -> None:
    """Put the figures of a case and part into the file, with the machine and the command."""
    report: dict[str, Any] = {"results": {}}
    if os.path.exists(path):
        with open(path) as file:
            report = json.load(file)
    about = circumstances(jax.devices()[0].platform, jax.devices()[0].device_kind)
    versions = {name: about["versions"][name] for name in ("python", "jax", "jaxlib", "numpy")}
    machine = {name: about[name] for name in ("processor", "cores", "platform", "flags")}
    command = shlex.join(["python", "benchmarks/convolutions.py", *sys.argv[1:]])
    report["results"].setdefault(case, {})[part] = {**machine, "versions": versions, "command": command, **found}
    with open(path, "w") as file:
        file.write(json.dumps(report).replace('{"shape"', '\n{"shape"') + "\n")  # a line for each layer


def main(words: list[str] | None = None) -> None:
    """Measure the parts of each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["32:64", "224:8"], help="SIDE:BATCH (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7, help="%(default)s")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args(words)
    apply_defaults()
    for case in options.cases:
        for part in options.parts:
            found = errors(case) if part == "error" else speeds(case, part, options.rounds)
            if options.json:
                save(options.json, case, part, found)


if __name__ == "__main__":
    main()
