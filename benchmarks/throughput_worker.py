"""A process of benchmarks/throughput.py, from both sides.

    python -m benchmarks.throughput_worker ARM

benchmarks/throughput.py starts it. A question is a line of JSON on standard input, an answer one on standard output.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from typing import IO, Any

import numpy as np

from benchmarks.throughput_cells import Cell
from vgg_jax.runtime import keep_freed_memory

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# The class of each arm. The first is the reference for the others.
ARMS = {
    "torch_eager": "throughput_torch.TorchEager",
    "torch_channels_last": "throughput_torch.TorchChannelsLast",
    "torch_compile": "throughput_torch.TorchCompile",
    "torch_compile_channels_last": "throughput_torch.TorchCompileChannelsLast",
    "ours": "throughput_jax.Ours",
    "program": "throughput_programs.Program",
    "network": "throughput_programs.ThroughNetwork",
    "optimized": "throughput_programs.Optimized",
    "plain": "throughput_jax.Plain",
    "keras": "throughput_keras.Keras",
    "onnxruntime": "throughput_engines.OnnxRuntime",
    "openvino": "throughput_engines.OpenVino",
    "ncnn": "throughput_engines.Ncnn",
    "mnn": "throughput_engines.Mnn",
}

PROGRAMS = ("program", "network", "optimized")  # they get only the settings that an import of vgg_jax applies


# --- the driver's side


class Process:
    """A worker process, as the driver sees it."""

    def __init__(self, name: str, log: IO[str], environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "benchmarks.throughput_worker", name]
        self.log, pipe = log.name, subprocess.PIPE
        self.process = subprocess.Popen(
            command, text=True, stdin=pipe, stdout=pipe, stderr=log, env=environment, cwd=ROOT
        )

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and return the answer; raise RuntimeError if there is none."""
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps({"command": command, **arguments}), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            with open(self.log) as file:
                last = (file.read().splitlines() or [""])[-1]
            raise RuntimeError(f"the process ended with code {self.process.wait()}: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def processor_seconds(self) -> float:
        """Return the processor time that the process has used."""
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError), self.process:  # closes the pipes, and waits
            pass


def busy_seconds() -> float:
    """Return the processor time that all processes have used."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, *interrupts = (int(n) for n in file.readline().split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


# --- the worker's side


def memory(field: str) -> int:
    """Return bytes: VmRSS, the resident memory now, or VmHWM, its peak; without /proc always the peak."""
    try:
        with open("/proc/self/status") as file:
            return int(re.findall(rf"{field}:\s+(\d+) kB", file.read())[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def return_freed() -> None:
    """Return free memory that glibc's allocator keeps to the system; do nothing with another C library."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def forget_peak() -> None:
    """Reset VmHWM, if the system allows it."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


class Worker:
    """The worker itself, which answers the driver."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.product: Any = None

    def prepare(self, cell: dict[str, Any], directory: str) -> dict[str, Any]:
        """Load, compile and warm up; write the logits to a file, and return the losses of the first two steps."""
        begin = time.perf_counter()
        module, _, arm_class = ARMS[self.name].partition(".")
        make = getattr(importlib.import_module(f"benchmarks.{module}"), arm_class)
        base = memory("VmRSS")
        with np.load(os.path.join(directory, "inputs.npz")) as inputs:
            images, labels = inputs["images"], inputs["labels"]
        with np.load(os.path.join(directory, "weights.npz")) as file:
            weights = dict(file)
        base += sum(array.nbytes for array in weights.values())
        self.arm = arm = make(Cell(**cell), weights, images, labels)
        del weights
        training = arm.cell.mode != "infer"
        if training:
            logits = arm.logits()
            arm.start_training()
        before = time.perf_counter() - begin
        seconds, results = self._first_steps()
        first_answer = before + seconds[0]
        if arm.cell.mode == "epoch":
            arm.start_epochs()
            seconds, _ = self._first_steps()
        logits = logits if training else results[0]
        logits = logits.float().cpu().numpy() if hasattr(logits, "cpu") else np.asarray(logits, np.float32)
        np.save(os.path.join(directory, f"{self.name}.npy"), logits)
        return {
            "device": str(arm.device),
            "losses": [float(result) for result in results[:2]] if training else [],
            "first_answer_seconds": first_answer,
            "compile_seconds": max(0.0, seconds[0] + seconds[1] - 2 * seconds[2]),
            "step_seconds": seconds[2],
            "base_bytes": base,
        }

    def _first_steps(self) -> tuple[list[float], list[Any]]:
        """Run three steps; the time of the first two beyond that of the third counts as compilation."""
        seconds, results = [], []
        for _ in range(3):
            start = time.perf_counter()
            results.append(self.arm.step())
            self.arm.wait(results[-1])
            seconds.append(time.perf_counter() - start)
        return seconds, results

    def time(self, steps: int) -> dict[str, float]:
        """Return the seconds of `steps` steps after one more. On a CPU wait for each, as PyTorch does: none overlap."""
        arm = self.arm
        arm.wait(arm.step())  # fills the caches again, which the other arms have used
        start = time.perf_counter()
        for _ in range(steps):
            result = arm.step()
            if arm.on_cpu:
                arm.wait(result)
        arm.wait(result)
        return {"seconds": time.perf_counter() - start}

    def matrix_product(self, n: int, seconds: float) -> dict[str, float]:
        """Return FLOP/s of a chain of n x n products in the cell's dtype, for about `seconds`."""
        if self.product is None:
            self.product = self.arm.matrix_product(n)
            self._multiply(2)
        count = max(2, math.ceil(seconds / (self._multiply(4) / 4)))
        return {"flops": 2 * n**3 * count / self._multiply(count)}

    def _multiply(self, count: int) -> float:
        b, multiply = self.product
        c, start = b, time.perf_counter()
        for _ in range(count):
            c = multiply(c)
        self.arm.wait(c)
        return time.perf_counter() - start

    def memory(self) -> dict[str, int]:
        """Return the peak memory: of the process in two steps, of the accelerator since the start."""
        self.product = None
        return_freed()
        forget_peak()
        self.time(1)
        return {"peak_bytes": memory("VmHWM"), "device_peak_bytes": self.arm.device_peak()}


def serve(name: str) -> None:
    """Answer until the driver closes the input. Output of libraries goes to standard error."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if name not in PROGRAMS:
        keep_freed_memory(one_arena=name.startswith("torch"))
    worker = Worker(name)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = getattr(worker, question.pop("command"))(**question)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:300]}"}
            print(answer["error"], file=sys.stderr)
        print(json.dumps(answer), file=channel, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
