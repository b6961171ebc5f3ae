"""What `Network.save` writes: the end of a path decides the format."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from vgg_jax.data.preprocessing import AUTHORS, Preprocessing
from vgg_jax.errors import UserError
from vgg_jax.export.folders import check_folder, write_folder
from vgg_jax.export.onnx_file import write_onnx
from vgg_jax.export.onnx_options import OnnxOptions
from vgg_jax.export.stablehlo import SUFFIX, save_stablehlo
from vgg_jax.weights.formats import Loaded, check_parent_folder, check_target, save_file


def _save_onnx(path: str, network: Loaded, **options: Any) -> tuple[str, ...]:
    write_onnx(path, network, OnnxOptions(**options))
    return ()


# The writers of programs by suffix. They take the options of the format and return notes.
PROGRAMS: dict[str, Callable[..., tuple[str, ...]]] = {SUFFIX: save_stablehlo, ".onnx": _save_onnx}


def save_network(path: str | os.PathLike[str], network: Loaded, **options: Any) -> tuple[str, ...]:
    """Save a network to a file, or to a folder if `path` ends in a slash, is a folder or has no suffix.

    Args:
      path: the file, which is overwritten if it exists; or the folder, which must be missing or empty.
      network: the network.
      **options: for .onnx the fields of `onnx_options.OnnxOptions`, for .stablehlo those of `stablehlo.save_stablehlo`,
        for a folder those of `folders.write_folder`.

    Returns:
      Notes: what was changed, or what other programs must know, one line each.

    Raises:
      UserError: if nothing is written for this suffix, or the file or folder cannot be written.
    """
    path = os.fspath(path)
    if is_folder(path):
        return write_folder(path, network, **options)
    if program := PROGRAMS.get(os.path.splitext(path)[1].lower()):
        return program(path, network, **options)
    if options:
        raise UserError(f"{path} is a file of weights; found the options {', '.join(options)}: leave them out")
    check_writable(path)
    save_file(path, network)
    if path.lower().endswith(".weights.h5") and not _is_authors(network.preprocessing):
        return ("keras.applications' preprocess_input is not the preprocessing of this network; normalize its images",)
    return ()


def _is_authors(preprocessing: Preprocessing | None) -> bool:
    """Return whether images are normalized as by `preprocess_input` of keras.applications' VGG, at whatever size."""
    return (
        preprocessing is not None
        and dataclasses.replace(preprocessing, resize=AUTHORS.resize, crop=AUTHORS.crop, exif=AUTHORS.exif) == AUTHORS
    )


def is_folder(path: str) -> bool:
    """Return whether `save_network` writes a folder at `path`."""
    return path.endswith(("/", os.sep)) or os.path.isdir(path) or not os.path.splitext(path)[1]


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise UserError if `save_network` could not write to `path`: a wrong suffix, a missing folder, or files in it."""
    path = os.fspath(path)
    if is_folder(path):
        return check_folder(path)
    if os.path.splitext(path)[1].lower() in PROGRAMS:
        return check_parent_folder(path)
    return check_target(path, tuple(PROGRAMS))
