"""The arms of benchmarks/throughput.py for engines made for inference.

Each engine reads the ONNX file that vgg_jax writes of the cell's network, with its batch norm folded and with the batch
of the cell. All compute in float32, with one thread for each core.

    python -m benchmarks.throughput_engines WEIGHTS CELL FILE    # writes this file, in a process of its own
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from typing import Any, ClassVar

import numpy as np

from benchmarks.throughput_cells import Cell

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Engine:
    """An engine: it opens the file, and computes the logits of the batch."""

    batch: ClassVar[int | None] = None  # the batch of the file; None: that of the cell

    def __init__(self, cell: Cell, weights: dict[str, np.ndarray], images: np.ndarray, labels: np.ndarray) -> None:
        if cell.mode != "infer" or cell.dtype != "float32":
            raise ValueError("the engines only infer, in float32")
        self.cell, self.device, self.on_cpu = cell, "cpu", True
        self.threads = int(os.environ["OMP_NUM_THREADS"])
        self.images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        with tempfile.TemporaryDirectory() as self.folder:
            np.savez(self.path("weights.npz"), **weights)  # type: ignore[arg-type] # a name could be that of another argument
            written = json.dumps(dataclasses.asdict(cell) | {"batch": self.batch or cell.batch})
            self.call(sys.executable, "-m", "benchmarks.throughput_engines", "weights.npz", written, "net.onnx")
            self.open(self.path("net.onnx"))

    def path(self, name: str) -> str:
        """Return the path of a file in the folder, which exists until the network is open."""
        return os.path.join(self.folder, name)

    def call(self, *command: str) -> None:
        """Run a command in the folder."""
        environment = os.environ | {"PYTHONPATH": ROOT}
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"{command[0]} ended with code {done.returncode}: {done.stderr.strip()[-200:]}")

    def open(self, path: str) -> None:
        """Open an ONNX file."""
        raise NotImplementedError

    def step(self) -> Any:
        """Return the logits of the batch."""
        raise NotImplementedError

    def logits(self) -> Any:
        """Return the logits of the batch."""
        return self.step()

    def wait(self, result: Any) -> None:
        """Do nothing: a call returns when the logits are computed."""

    def matrix_product(self, n: int) -> Any:
        """Return a matrix and the function that multiplies by it, in NumPy."""
        b = np.random.default_rng(0).standard_normal((n, n), np.float32) / np.float32(n**0.5)
        return b, lambda c: c @ b

    def device_peak(self) -> int:
        """Return 0: there is no accelerator."""
        return 0


class OnnxRuntime(Engine):
    """ONNX Runtime."""

    def open(self, path: str) -> None:
        """Open an ONNX file."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {self.session.get_inputs()[0].name: self.images}

    def step(self) -> Any:
        """Return the logits of the batch."""
        return self.session.run(None, self.inputs)[0]


class OpenVino(Engine):
    """OpenVINO."""

    options: ClassVar[dict[str, Any]] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}

    def open(self, path: str) -> None:
        """Open an ONNX file."""
        import openvino

        options = {**self.options, "INFERENCE_NUM_THREADS": self.threads}
        self.network = openvino.Core().compile_model(path, "CPU", options)

    def step(self) -> Any:
        """Return the logits of the batch."""
        return self.network(self.images)[0]


class Ncnn(Engine):
    """ncnn, which takes one image at a time."""

    batch: ClassVar[int | None] = 1

    def open(self, path: str) -> None:
        """Convert an ONNX file by pnnx, and open it."""
        import ncnn
        import pnnx

        self.call(pnnx.EXEC_PATH, path, "fp16=0")
        self.ncnn, self.network = ncnn, ncnn.Net()
        self.network.opt.num_threads = self.threads
        for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage", "bf16_packed"):
            if hasattr(self.network.opt, f"use_{name}"):
                setattr(self.network.opt, f"use_{name}", False)
        assert self.network.load_param(self.path("net.ncnn.param")) == 0
        assert self.network.load_model(self.path("net.ncnn.bin")) == 0

    def step(self) -> Any:
        """Return the logits of the batch."""
        return np.stack([self.output(image) for image in self.images])

    def output(self, image: np.ndarray, name: str = "out0") -> np.ndarray:
        """Return an output for one image (3, H, W)."""
        with self.network.create_extractor() as extractor:
            assert extractor.input("in0", self.ncnn.Mat(image)) == 0
            code, found = extractor.extract(name)
            assert code == 0
            return np.array(found)


class Mnn(Engine):
    """MNN."""

    def open(self, path: str) -> None:
        """Convert an ONNX file, and open it."""
        import MNN

        out = self.path("net.mnn")
        # Not the command mnnconvert, which installs packages.
        convert = "import MNN, _tools, sys; _tools.mnnconvert(sys.argv)"
        arguments = ("-f", "ONNX", "--modelFile", path, "--MNNModel", out, "--bizCode", "vgg")
        self.call(sys.executable, "-c", convert, *arguments)
        options = {"backend": "CPU", "precision": "high", "numThread": self.threads}
        runtime = MNN.nn.create_runtime_manager((options,))
        self.network = MNN.nn.load_module_from_file(out, ["images"], ["logits"], runtime_manager=runtime)
        self.expr = MNN.expr
        self.input = MNN.expr.placeholder(list(self.images.shape), MNN.expr.NCHW, MNN.expr.float)

    def step(self) -> Any:
        """Return the logits of the batch."""
        self.input.write(self.images)
        (logits,) = self.network.onForward([self.input])
        return np.array(self.expr.convert(logits, self.expr.NCHW).read())


def write(weights: str, cell: str, path: str) -> None:
    """Write the ONNX file of a cell, with the weights of an .npz file."""
    from vgg_jax import VGG, from_torch
    from vgg_jax.export.onnx_file import write_onnx
    from vgg_jax.export.onnx_options import OnnxOptions
    from vgg_jax.weights.formats import Loaded

    given = Cell(**json.loads(cell))
    with np.load(weights) as file:
        model, variables = from_torch(dict(file), VGG(**given.fields))
    size = (given.size, given.size)
    write_onnx(path, Loaded(model, variables, None), OnnxOptions(batch=given.batch, size=size, fold=given.batch_norm))


if __name__ == "__main__":
    write(*sys.argv[1:])
