"""Measure images per second of vgg_jax, PyTorch and Keras.

    python benchmarks/throughput.py [--cells main|all|NAME...] [--json FILE]

A cell is a network, an image size, and inference or training: vgg16_bn-32-train, vgg16-224-infer-bf16. Each arm (a
framework or a variant) has its own process, with one thread for each core, and the same weights and images. On a CPU
each arm keeps freed memory, as the commands of vgg_jax do, because this makes PyTorch faster too.

Before the timing, the logits of each arm, and its losses before and after a step, are compared with those of PyTorch
eager. An arm that disagrees is not timed, and the exit code is 1. Then the arms run in turn. Each runs for a few
seconds after one step that is not timed, while the others wait. The first arm changes in each round. The result is the
median over rounds, without compilation. The first answer counts from the import of the framework to the first result,
with the conversion of the weights and, for engines, of the ONNX file. The ceiling is a matrix product in the same
rounds, the faster of JAX's and PyTorch's. Finally each arm returns its free memory, and its peak memory is measured in
two steps.

Training is cross entropy and SGD without dropout: learning rate 0.0001, momentum 0.9, weight decay 5e-4 (none in
Keras, whose weight decay has another definition). PyTorch uses its fastest options: fused SGD, inference_mode, both
memory formats, torch.compile. On an accelerator the cells are in bfloat16, and float32 is not TF32.

The command needs torch and torchvision, and keras for that arm. The arms onnxruntime, openvino, ncnn and mnn infer
only; they need the extras export and engines. An arm whose package is missing is named and left out. All processes of a
cell exist at the same time: with all arms of PyTorch and Keras, vgg16-224-train needs more than 24 GiB.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from benchmarks.throughput_cells import Cell, flops, parse_cell, write_inputs  # noqa: E402 - after the path
from benchmarks.throughput_worker import ARMS, Process, busy_seconds  # noqa: E402 - after the path

MAIN = ("vgg16_bn-32-infer", "vgg16_bn-32-train", "vgg16-224-infer", "vgg16-224-train")
OTHERS = tuple(
    f"{network}-{mode}"
    for network in ("vgg11_bn-32", "vgg16-32", "vgg19_bn-32", "vgg11-224", "vgg16_bn-224", "vgg19-224")
    for mode in ("infer", "train")
)
CELLS = {
    "cpu": (MAIN, (*OTHERS, "vgg16_bn-32-train-bf16")),
    "gpu": ((*(f"{name}-bf16" for name in MAIN), "vgg16_bn-32-epoch-bf16"), (*(f"{n}-bf16" for n in OTHERS), *MAIN)),
}
ARMS_OF_OTHERS = ("torch_eager", "torch_channels_last", "ours")
BATCH = {"cpu": {32: 64, 224: 8}, "gpu": {32: 512, 224: 256}}
PRODUCT = {"cpu": 2048, "gpu": 8192}  # the matrices' side
# Upper bounds of the disagreement of logits, and of a loss.
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (5e-2, 5e-2)}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "torchvision", "keras", "numpy")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "OMP_NUM_THREADS", "MALLOC_CONF", "LD_PRELOAD", "MALLOC_ARENA_MAX")


def run_burst(cell: Cell, arm: dict[str, Any], process: Process, seconds: float) -> None:
    """Run an arm for about `seconds` and at least two steps, or for an epoch, and append its rate to `arm`."""
    steps = cell.examples // cell.batch if cell.mode == "epoch" else max(2, math.ceil(seconds / arm["step_seconds"]))
    before = busy_seconds() - process.processor_seconds()
    elapsed = process.ask("time", steps=steps)["seconds"]
    others = busy_seconds() - process.processor_seconds() - before
    arm.setdefault("rounds", []).append(steps * cell.batch / elapsed)
    arm.setdefault("cores_of_others", []).append(max(0.0, others) / elapsed)


def disagreement(actual: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Return the relative difference of two arms: of the norm of their logits, and of each loss."""
    a, b = (arm["logits"].astype(np.float64) for arm in (actual, expected))
    figures = {"logits": float(np.linalg.norm(a - b) / np.linalg.norm(b))}
    for i, (a, b) in enumerate(zip(actual["losses"], expected["losses"], strict=True), 1):
        figures[f"loss {i}"] = abs(a - b) / max(expected["losses"])
    return figures


def agrees(cell: Cell, figures: dict[str, float]) -> bool:
    """Return whether all differences are within the tolerance."""
    of_logits, of_losses = TOLERANCE[cell.dtype]
    return all(value < (of_logits if key == "logits" else of_losses) for key, value in figures.items())


def measure(cell: Cell, names: list[str], rounds: int, seconds: float, product: int) -> dict[str, Any]:
    """Measure all arms of one cell; return their results by name, and the rates of the matrix product."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"} | {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "KERAS_BACKEND": "jax",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",  # compilation is timed
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the arms share the accelerator
    }
    arms: dict[str, dict[str, Any]] = {}
    processes: dict[str, Process] = {}
    reference = ""  # the first arm that works: PyTorch eager
    rates: dict[str, list[float]] = {"jax": [], "torch": []}

    def drop(name: str, error: RuntimeError) -> None:
        arms[name]["error"] = str(error)
        arms[name].pop("rounds", None)
        processes.pop(name).close()

    with tempfile.TemporaryDirectory() as directory, open(os.path.join(directory, "log"), "w") as log:
        write_inputs(cell, directory)
        try:
            for name in names:
                process = processes[name] = Process(name, log, environment)
                arm = arms[name] = {}
                try:
                    arm |= process.ask("prepare", cell=dataclasses.asdict(cell), directory=directory)
                    arm["logits"] = np.load(os.path.join(directory, f"{name}.npy"))
                    reference = reference or name
                    arm["disagreement"] = figures = disagreement(arm, arms[reference])
                    note = described(figures)
                    if not agrees(cell, figures):
                        raise RuntimeError(f"disagrees with {reference}: {note}")
                except RuntimeError as error:
                    arm["error"] = note = str(error)
                    processes.pop(name).close()
                print(f"{cell.name}, {name}: {note}", file=sys.stderr, flush=True)
            for i in range(rounds):
                order, first = list(processes), i % max(1, len(processes))
                for name in order[first:] + order[:first]:
                    try:
                        run_burst(cell, arms[name], processes[name], seconds)
                    except RuntimeError as error:
                        drop(name, error)
                libraries = {"torch" if name.startswith("torch") else "jax": name for name in reversed(processes)}
                for library, name in libraries.items():
                    try:
                        answer = processes[name].ask("matrix_product", n=product, seconds=seconds / 2)
                        rates[library].append(answer["flops"])
                    except RuntimeError as error:
                        drop(name, error)
            for name in list(processes):
                try:
                    arms[name] |= processes[name].ask("memory")
                except RuntimeError as error:
                    drop(name, error)
        finally:
            for process in processes.values():
                process.close()
    return summary(cell, arms, rates)


def described(figures: dict[str, float]) -> str:
    """Return the figures as one line."""
    return ", ".join(f"{key} {value:.1e}" for key, value in figures.items())


def summary(cell: Cell, arms: dict[str, dict[str, Any]], rates: dict[str, list[float]]) -> dict[str, Any]:
    """Return medians, ratios, and fractions of the matrix product's rate."""
    ceiling = max((statistics.median(values) for values in rates.values() if values), default=0.0)
    for arm in arms.values():
        arm.pop("logits", None)
        if "rounds" in arm:
            arm["images_per_second"] = statistics.median(arm["rounds"])
            arm["share_of_product"] = arm["images_per_second"] * flops(cell) / ceiling
            if cell.mode == "epoch":
                arm["epoch_seconds"] = cell.examples / arm["images_per_second"]
    ours = arms.get("ours", {})
    for arm in arms.values():
        if "rounds" in arm and "rounds" in ours:
            arm["ours_over_it"] = ours["images_per_second"] / arm["images_per_second"]
            arm["ours_over_it_rounds"] = [a / b for a, b in zip(ours["rounds"], arm["rounds"], strict=True)]
    figures: dict[str, Any] = {"flops_per_image": flops(cell), "matrix_product_flops": rates, "ceiling_flops": ceiling}
    return {"cell": dataclasses.asdict(cell), **figures, "arms": arms}


# --- output


def rows(result: dict[str, Any]) -> list[str]:
    """Return the rows of the table for one cell."""
    cell, lines = result["cell"], []
    for name, arm in result["arms"].items():
        start = f"| {cell['name']}, batch {cell['batch']} | {name} |"
        if "rounds" not in arm:
            lines.append(f"{start} not timed: {arm['error']} | | | | |")
            continue
        memory = f"{arm['peak_bytes'] / 2**20:,.0f}, {(arm['peak_bytes'] - arm['base_bytes']) / 2**20:,.0f}"
        if arm["device_peak_bytes"]:
            memory += f"; device {arm['device_peak_bytes'] / 2**20:,.0f}"
        ratio = ""
        if "ours_over_it" in arm:
            spread = arm["ours_over_it_rounds"]
            ratio = f"{arm['ours_over_it']:.2f} ({min(spread):.2f} to {max(spread):.2f})"
        lines.append(
            f"{start} {arm['images_per_second']:,.4g} | {ratio} | {arm['share_of_product']:.2f} | "
            f"{arm['first_answer_seconds']:.1f}, {arm['compile_seconds']:.1f} | {memory} |"
        )
    return lines


def circumstances(platform_name: str, device: str) -> dict[str, Any]:
    """Return versions, machine, flags and load."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    models = []
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip(),
        "versions": versions,
        "platform": platform_name,
        "device": device,
        "processor": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": {name: os.environ[name] for name in FLAGS if name in os.environ},
        "load_before": os.getloadavg(),
    }


def find_platform() -> tuple[str, str]:
    """Return JAX's platform and device, from a process that ends, so that the driver holds no device."""
    code = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep='\\n')"
    answer = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    name, device = answer.stdout.splitlines()[-2:]
    return name, device


def main() -> int:
    """Measure the cells one after the other; print the table and write the JSON file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["main"], help="main, all, or names (%(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="by default all; three outside the main cells")
    parser.add_argument("--rounds", type=int, help="by default 5; 2 outside the main cells")
    parser.add_argument("--seconds", type=float, default=3.0, help="of one arm in a round (%(default)s)")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--product-size", type=int, help="size of the matrices of the product")
    parser.add_argument("--examples", type=int, default=50_000, help="number of examples of an epoch (%(default)s)")
    options = parser.parse_args()
    name, device = find_platform()
    kind = "cpu" if name == "cpu" else "gpu"
    main_cells, others = CELLS[kind]
    groups = {"main": main_cells, "all": (*main_cells, *others)}
    cells = []
    for cell_name in itertools.chain(*(groups.get(name, (name,)) for name in options.cells)):
        try:
            batch = options.batch_size or BATCH[kind][32 if "-32-" in cell_name else 224]
            cells.append(parse_cell(cell_name, batch, options.image_size or 0, options.examples))
        except ValueError as error:
            parser.error(str(error))
    report = {**circumstances(name, device), "cells": []}
    print(
        "| cell | arm | images/s | vgg_jax over this arm (range) | fraction of the matrix product | first answer, "
        "compilation, s | peak memory, MiB; beyond imports and weights |\n|---|---|---|---|---|---|---|"
    )
    for cell in cells:
        is_main = cell.name in main_cells
        arms = options.arms or (ARMS if is_main else ARMS_OF_OTHERS)
        arms = [arm for arm in ARMS if arm in arms]
        rounds = options.rounds or (5 if is_main else 2)
        product = options.product_size or PRODUCT[kind]
        result = measure(cell, arms, rounds, options.seconds, product)
        report["cells"].append(result)
        print("\n".join(rows(result)), flush=True)
        if options.json:
            with open(options.json, "w") as file:
                json.dump(report, file, indent=1)
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    ceilings = ", ".join(f"{result['ceiling_flops'] / 1e9:,.0f}" for result in report["cells"])
    load = ", ".join(f"{value:.2f}" for value in report["load_before"])
    measured = [arm for result in report["cells"] for arm in result["arms"].values()]
    foreign = [cores for arm in measured for cores in arm.get("cores_of_others", ())] or [0.0]
    print(
        f"\nCommit {report['commit']}; {versions}; {device} ({name}); {report['processor']}, {report['cores']} cores; "
        f"flags {report['flags'] or 'none'}; load before {load}; cores used by other processes: "
        f"{statistics.median(foreign):.2f}, at most {max(foreign):.2f}; matrix product in GFLOP/s, by cell: {ceilings}"
    )
    return int(any(arm.get("error", "").startswith("disagrees") for arm in measured))


if __name__ == "__main__":
    sys.exit(main())
