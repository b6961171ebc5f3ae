"""ONNX networks in 8-bit integers, by the quantizer of ONNX Runtime."""

import dataclasses
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import PIL.Image

from vgg_jax.console import counted, note
from vgg_jax.data.image_files import read_image
from vgg_jax.data.listing import find_images
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.errors import UserError, require
from vgg_jax.export.onnx_file import check_onnx_target, write_bytes
from vgg_jax.export.onnx_graph import INPUT, onnx_model
from vgg_jax.export.onnx_options import DEFAULT, OnnxOptions
from vgg_jax.weights.formats import Loaded, write_atomically

MOST_IMAGES = 500  # for calibration, because each runs through the network in float32


def write_int8(
    path: str | os.PathLike[str], network: Loaded, folder: str | os.PathLike[str], options: OnnxOptions = DEFAULT
) -> int:
    """Write a network as an ONNX file whose weights and activations are 8-bit integers.

    The batch norm is folded. The weights are int8 with a scale for each output channel. The activations are uint8, and
    the range of each is that of the images in a folder. Input and output are those of `write_onnx`.

    Args:
      path: the file, which is overwritten if it exists. It ends in .onnx.
      network: the network, whose preprocessing is known.
      folder: images for calibration; if it has more than 500, so many are taken at equal distances.
      options: the choices of the file; batch norm is always folded, and a size must be the crop.

    Returns:
      The number of images that were used.

    Raises:
      UserError: if the path or an option is wrong, the folder has no image that can be read, the preprocessing is
        unknown, onnx or onnxruntime is not installed, or the file cannot be written.

    Source:
      `quantize_static` of ONNX Runtime.
    """
    require("onnxruntime.quantization", "export")
    path = os.fspath(path)
    check_onnx_target(path)
    preprocessing = network.preprocessing
    if preprocessing is None:
        raise UserError(
            "calibration needs the preprocessing, which the network does not state: add --preprocessing imagenet, "
            "authors or cifar10, or pass preprocessing to vgg_jax.load"
        )
    options = dataclasses.replace(options, fold=True)
    view = (preprocessing.crop, preprocessing.crop)
    if options.size not in (None, view):
        raise UserError(
            f"the size is {options.size}; expected that of the preprocessing, {view}, in which the images for "
            "calibration are: add --resize and --crop, or leave out the size"
        )
    if not os.path.isdir(folder):
        raise UserError(f"{os.fspath(folder)} is no folder; expected one with images for calibration: choose another")
    paths = [image for _, image in find_images(os.fspath(folder)) if isinstance(image, str)]
    count = min(len(paths), MOST_IMAGES)
    calibration = Calibration([paths[i * len(paths) // count] for i in range(count)], preprocessing, options)
    model = onnx_model(_in_float32(network), options)
    try:
        quantized = _quantize(model, calibration)
    except ValueError:
        if calibration.count:
            raise
        raise UserError(
            f"{os.fspath(folder)} has no image that can be read; expected some for calibration: choose another folder"
        ) from None
    write_atomically(path, lambda partial: write_bytes(partial, quantized.SerializeToString()))
    return calibration.count


class Calibration:
    """The reader of images that ONNX Runtime's quantizer asks for: each call gives the input of one image."""

    def __init__(self, paths: Sequence[str], preprocessing: Preprocessing, options: OnnxOptions) -> None:
        """Prepare to read the images at `paths` as the graph with `options` takes them; skip those that are damaged."""
        self.count = 0  # of images that were read
        self._inputs = self._read(paths, preprocessing, options)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next input by name, or None after the last."""
        return next(self._inputs, None)

    def _read(
        self, paths: Sequence[str], preprocessing: Preprocessing, options: OnnxOptions
    ) -> Iterator[dict[str, np.ndarray]]:
        for path in counted(paths, len(paths), "calibration", "images"):
            try:
                image = read_image(path, lambda image: graph_input(image, preprocessing, options))
            except UserError as error:
                note(f"skipped: {error}")
                continue
            self.count += 1
            yield {INPUT: np.repeat(image[None], options.batch or 1, axis=0)}


def graph_input(image: PIL.Image.Image, preprocessing: Preprocessing, options: OnnxOptions) -> np.ndarray:
    """Return an image as a graph takes it: (C, H, W) or (H, W, C), float32 or uint8.

    Args:
      image: the image.
      preprocessing: its preprocessing.
      options: the choices of the graph.
    """
    view = preprocessing.view(image) if options.uint8 else preprocessing(image)
    if options.uint8 and preprocessing.channel_order == "BGR":
        view = view[..., ::-1]  # the graph takes RGB
    return np.ascontiguousarray(view.transpose(2, 0, 1) if options.layout == "NCHW" else view)


def _in_float32(network: Loaded) -> Loaded:
    """Return the network with weights in float32, which the quantizer needs."""
    variables = jax.tree.map(lambda array: np.asarray(array, np.float32), dict(network.variables))
    return network._replace(model=network.model.clone(param_dtype=np.float32), variables=variables)


def _quantize(model: Any, calibration: Calibration) -> Any:
    """Return the quantized model, with the metadata of the model."""
    quantization = require("onnxruntime.quantization", "export")
    onnx = require("onnx", "export")
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the quantizer's advice is about graphs that are not folded
    try:
        with tempfile.TemporaryDirectory() as scratch:
            target = os.path.join(scratch, "int8.onnx")
            quantization.quantize_static(
                model,
                target,
                calibration,
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "Gemm", "MaxPool"],
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
            quantized = onnx.load(target)
    finally:
        logging.disable(level)
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(model.metadata_props)
    return quantized
