"""ONNX files: written at once, and compared with ONNX Runtime."""

import os
from typing import Any

import jax
import numpy as np

from vgg_jax.errors import UserError, require
from vgg_jax.export.onnx_graph import onnx_model
from vgg_jax.export.onnx_options import DEFAULT, OnnxOptions
from vgg_jax.weights.formats import Loaded, check_parent_folder, write_atomically

LARGEST = 2**31 - 1  # bytes of a protocol buffer


def write_onnx(path: str | os.PathLike[str], network: Loaded, options: OnnxOptions = DEFAULT) -> None:
    """Write a network as an ONNX file, which appears complete or not at all.

    The input is `images`, float32 or uint8. The output, in float32, is `logits`, `probabilities`, `values` or
    `features`. The graph computes in float32, with operator set 17. The weights keep their dtype.

    Args:
      path: the file, which is overwritten if it exists. It ends in .onnx.
      network: the network.
      options: the choices of the file.

    Raises:
      UserError: if the path is wrong, onnx is not installed, an option does not fit the network, the file would have
        more than 2 GiB, or it cannot be written.
    """
    path = os.fspath(path)
    check_onnx_target(path)
    model = onnx_model(network, options)
    if model.ByteSize() > LARGEST:
        raise UserError(
            f"the network has {model.ByteSize():,} bytes; an ONNX file has at most {LARGEST:,}: convert the weights to "
            "float16 first"
        )
    write_atomically(path, lambda partial: write_bytes(partial, model.SerializeToString()))


def check_onnx_target(path: str) -> None:
    """Raise UserError if a path does not end in .onnx, or its folder does not exist."""
    suffix = os.path.splitext(path)[1]
    if suffix.lower() != ".onnx":
        raise UserError(f"{path} ends in {suffix!r}; expected .onnx: change the suffix")
    check_parent_folder(path)


def onnx_runtime(model: str | bytes) -> Any:
    """Return a session of ONNX Runtime on the CPU for a file or its content.

    Raises:
      UserError: if onnxruntime is not installed.
    """
    runtime = require("onnxruntime", "export")
    settings = runtime.SessionOptions()
    settings.log_severity_level = 3  # errors only
    return runtime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def error_against_onnx_runtime(path: str, network: Loaded, options: OnnxOptions) -> float:
    """Return the relative error of what ONNX Runtime computes from a file, for random pixels of one or two images.

    Args:
      path: the file.
      network: the network that it was written from.
      options: the choices of the file.

    Returns:
      The norm of the difference divided by the norm of our outputs, in float32.

    Raises:
      UserError: if onnxruntime is not installed.
    """
    session = onnx_runtime(path)
    size = options.checked_size(network)
    if size is None:
        crop = network.preprocessing.crop if network.preprocessing else 64
        size = (max(crop, network.model.smallest_image()),) * 2
    channels = network.variables["params"]["conv1_1"]["kernel"].shape[2]
    pixels = np.random.default_rng(0).integers(0, 256, (options.batch or 2, *size, channels), np.uint8)
    images = pixels.astype(np.float32) / 255
    inputs: np.ndarray = pixels if options.uint8 else images
    if options.uint8 and network.preprocessing is not None:
        order = -1 if network.preprocessing.channel_order == "BGR" else 1
        mean, std = (np.array(a, np.float32) for a in (network.preprocessing.mean, network.preprocessing.std))
        images = (images[..., ::order] - mean) / std
    if options.layout == "NCHW":
        inputs = np.ascontiguousarray(inputs.transpose(0, 3, 1, 2))
    actual = session.run(None, {session.get_inputs()[0].name: inputs})[0]
    model = network.model.clone(dtype=np.float32, precision="highest")
    expected = np.asarray(jax.jit(model.apply)(network.variables, images))
    if options.softmax:
        activation = jax.nn.sigmoid if network.outputs == "sigmoid" else jax.nn.softmax
        expected = np.asarray(activation(expected))
    if expected.ndim == 4 and options.layout == "NCHW":
        expected = expected.transpose(0, 3, 1, 2)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def write_bytes(path: str, content: bytes) -> None:
    """Write the content of a file."""
    with open(path, "wb") as file:
        file.write(content)
