"""The time of each layer of an inference beside an engine, and its floor: python benchmarks/layers.py CELL RIVAL

    python benchmarks/layers.py vgg16-224-infer ncnn
    python benchmarks/layers.py vgg16_bn-32-infer openvino

CELL is one of benchmarks/throughput.py, with one image. The network is optimized for inference. Our times come from a
trace of JAX's profiler, and OpenVINO's from its own profile; ncnn's are the differences between the shortest times
to the outputs of successive layers. Pooling and activations count for the layer with which a program joins them.

The floor of a layer is the longer of two times: that to read its kernel from memory, at the rate of one large sum, and
that of its multiplications, at the rate of one large matrix product. Both are those of the method that vgg_jax takes.
The command prints a table in Markdown.
"""

import argparse
import collections
import functools
import glob
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as in the commands
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))  # the threads of the engines

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.throughput_cells import Cell, parse_cell, write_inputs
from benchmarks.throughput_engines import Ncnn, OpenVino
from vgg_jax import VGG, from_torch, optimize_for_inference
from vgg_jax.evaluation.optimized import COMPILER_OPTIONS
from vgg_jax.ops import winograd
from vgg_jax.runtime import keep_freed_memory

LAYER = re.compile(r"conv\d_\d|fc\d")
OTHER = "other"
CALLS = 40
Times = dict[str, float]  # milliseconds by the name of the layer


def layer_of(name: str) -> str:
    """Return the layer that a name of an operation contains."""
    found = LAYER.search(name)
    return found[0] if found else OTHER


def by_layer(times: dict[str, list[float]]) -> Times:
    """Return the times of the layers, from the times of each operation in all calls: medians, added up."""
    found: Times = collections.defaultdict(float)
    for name, values in times.items():
        found[layer_of(name)] += statistics.median(values) * len(values) / CALLS  # some run several times in a call
    return found


def milliseconds(call: Callable[[], Any], pick: Callable[[list[float]], float] = statistics.median) -> float:
    """Return the time of a call, picked from those of several calls."""
    call()
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * pick(times)


class ProfiledOpenVino(OpenVino):
    """OpenVINO, which profiles itself."""

    options = OpenVino.options | {"PERF_COUNT": True}

    def times(self) -> Times:
        """Return the times of the layers."""
        request = self.network.create_infer_request()
        found = collections.defaultdict(list)
        request.infer(self.images)
        for _ in range(CALLS):
            request.infer(self.images)
            for node in request.profiling_info:
                found[node.node_name].append(1e3 * node.real_time.total_seconds())
        return by_layer(found)


class ProfiledNcnn(Ncnn):
    """ncnn, stopped after each layer."""

    def open(self, path: str) -> None:
        """Open an ONNX file, and find the outputs of the layers."""
        super().open(path)
        with open(self.path("net.ncnn.param")) as file:
            lines = [line.split() for line in file]
        self.outputs = [line[5] for line in lines if line[0] in ("Convolution", "InnerProduct")]

    def times(self) -> Times:
        """Return the times between the outputs of the layers."""
        found, before = {}, 0.0
        model = VGG(**self.cell.fields)
        layers = [layer for part in (*model.stages, model.head) for layer in part]
        names = [layer.name for layer in layers if LAYER.fullmatch(layer.name)]
        for name, output in zip(names, self.outputs, strict=True):
            reached = milliseconds(functools.partial(self.output, self.images[0], output), min)
            found[name], before = reached - before, reached
        return found


RIVALS: dict[str, Any] = {"openvino": ProfiledOpenVino, "ncnn": ProfiledNcnn}


class Ours:
    """The optimized network, compiled as a `Network` compiles it."""

    def __init__(self, cell: Cell, weights: dict[str, np.ndarray], images: np.ndarray) -> None:
        model, self.variables = optimize_for_inference(*from_torch(weights, VGG(**cell.fields)), images.shape)
        self.images = jax.device_put(images)
        lowered = jax.jit(model.apply).lower(self.variables, self.images)
        self.program = lowered.compile(COMPILER_OPTIONS)

    def step(self) -> Any:
        """Return the logits."""
        return self.program(self.variables, self.images).block_until_ready()

    def times(self) -> Times:
        """Return the times of the layers, from a trace."""
        operations = dict(re.findall(r'%([\w.\-]+) = .*?op_name="([^"]*)"', self.program.as_text() or ""))
        found = collections.defaultdict(list)
        self.step()
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(CALLS):
                    self.step()
            (path,) = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
            for plane in jax.profiler.ProfileData.from_file(path).planes:
                for event in (event for line in plane.lines for event in line.events):
                    if event.name in operations:
                        found[f"{operations[event.name]} {event.name}"].append(event.duration_ns / 1e6)
        return by_layer(found)

    def floors(self, memory: float, products: float, maps: dict[str, int]) -> dict[str, tuple[float, float, float]]:
        """Return MiB of the kernel, GFLOP of the products and the floor in milliseconds of each layer.

        Args:
          memory: bytes/s.
          products: FLOP/s.
          maps: the side of the input of each convolution.
        """
        found = {}
        for name, leaves in self.variables["params"].items():
            kernel = leaves["kernel"]
            flops = 2 * kernel.size * rows_of(kernel, maps.get(name, 1))
            floor = 1e3 * max(kernel.nbytes / memory, flops / products)
            found[name] = kernel.nbytes / 2**20, flops / 1e9, floor
        return found


def rows_of(kernel: Any, side: int) -> int:
    """Return the rows by which each number of a kernel is multiplied, given the side of the map."""
    if kernel.ndim != 3:
        return side * side
    if len(kernel) == 9:  # Karatsuba's algorithm
        return 1
    tiles = -(-side // winograd.rows_of(kernel))
    return tiles * tiles


def memory_rate() -> float:
    """Return the bytes/s of one large sum."""
    array = jnp.ones(2**27, jnp.float32)
    total = jax.jit(jnp.sum)
    return 1e3 * array.nbytes / milliseconds(lambda: total(array).block_until_ready())


def product_rate(n: int = 2048) -> float:
    """Return the FLOP/s of one large matrix product."""
    matrix = jnp.ones((n, n), jnp.float32)
    product = jax.jit(jnp.matmul)
    return 2e3 * n**3 / milliseconds(lambda: product(matrix, matrix).block_until_ready())


def report(cell: Cell, rival: str) -> None:
    """Measure, and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(cell, folder)
        with np.load(os.path.join(folder, "inputs.npz")) as inputs:
            images, labels = inputs["images"], inputs["labels"]
        with np.load(os.path.join(folder, "weights.npz")) as file:
            weights = dict(file)
    ours = Ours(cell, weights, images)
    theirs = RIVALS[rival](cell, weights, images, labels)
    memory, products = memory_rate(), product_rate()
    geometry = VGG(**cell.fields).layer_geometry
    maps = {name: cell.size // geometry[name].stride for name in geometry if name.startswith("conv")}
    floors = ours.floors(memory, products, maps)
    rows = {"vgg_jax": ours.times(), rival: theirs.times()}
    total = {"vgg_jax": milliseconds(ours.step), rival: milliseconds(theirs.step)}
    print(f"\n{cell.name}, one image. Memory {memory / 1e9:.0f} GB/s, matrix product {products / 1e9:.0f} GFLOP/s.\n")
    print(f"| layer | kernel, MiB | GFLOP | floor, ms | vgg_jax, ms | {rival}, ms |\n|---|---|---|---|---|---|")
    for name, (size, work, floor) in floors.items():
        print(f"| {name} | {size:.1f} | {work:.2f} | {floor:.2f} | " + cells(rows, name))
    print("| other | | | | " + cells(rows, OTHER))
    sums = [sum(column) for column in zip(*floors.values(), strict=True)]
    print(f"| sum | {sums[0]:.1f} | {sums[1]:.2f} | {sums[2]:.2f} | ", end="")
    print(" | ".join(f"{sum(times.values()):.2f}" for times in rows.values()) + " |")
    print("| a call | | | | " + " | ".join(f"{time:.2f}" for time in total.values()) + " |", flush=True)


def cells(rows: dict[str, Times], name: str) -> str:
    """Return the two times of a layer as cells of the table."""
    return " | ".join(f"{times.get(name, 0.0):.2f}" for times in rows.values()) + " |"


def main() -> None:
    """Print the table of a cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", help="such as vgg16-224-infer")
    parser.add_argument("rival", choices=list(RIVALS))
    parser.add_argument("--size", type=int, default=0, help="side of the images in pixels, to try the command")
    options = parser.parse_args()
    keep_freed_memory()
    report(parse_cell(options.cell, 1, options.size), options.rival)


if __name__ == "__main__":
    main()
