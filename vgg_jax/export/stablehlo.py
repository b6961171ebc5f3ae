"""StableHLO: a network as a program that JAX runs without vgg_jax and Flax, for CPU, CUDA, ROCm and TPU."""

import contextlib
import os
import uuid
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax import export

from vgg_jax.errors import UserError, first_line, require
from vgg_jax.weights.formats import Loaded, own_metadata

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
SUFFIX = ".stablehlo"
LARGEST_PROGRAM = 2**31 - 2**20  # bytes: FlatBuffers, which holds the program, ends at 2 GiB


def save_stablehlo(
    path: str | os.PathLike[str],
    network: Loaded,
    *,
    size: int | str | None = None,
    platforms: Sequence[str] = PLATFORMS,
    beside: bool = False,
    probabilities: bool = False,
) -> tuple[str, ...]:
    """Save a network as a serialized program of `jax.export`, for any number of images.

    Args:
      path: the file, whose name ends in .stablehlo. It is overwritten if it exists.
      network: the network. The program takes preprocessed images: (N, H, W, C) float32, or float64 if the network
        computes in float64.
      size: the height and width of the images; "any" for all heights and widths that the network takes; None for the
        crop of its preprocessing.
      platforms: the devices, of cpu, cuda, rocm and tpu.
      beside: write the weights to a .safetensors file of the same name, and pass them to the program: it then has two
        arguments, the weights by name and the images. An older file of this kind is overwritten, another one is not. By
        default the weights are part of the program.
      probabilities: return the softmax or sigmoid of the logits, as the network's outputs mean; values stay.

    Returns:
      Notes, such as the name of the second file.

    Raises:
      UserError: if the suffix or a platform is another, flatbuffers is missing, the network takes no such images, the
        weights are too large for the program, the file beside would replace another network's, or a file cannot be
        written.
    """
    path = os.fspath(path)
    if not path.lower().endswith(SUFFIX):
        raise UserError(f"{path} does not end in {SUFFIX}; expected a name that does: rename it")
    require("flatbuffers", "export")
    weights = _named(network.variables)
    total = sum(array.nbytes for array in weights.values())
    if not beside and total > LARGEST_PROGRAM:
        raise UserError(f"the weights have {total:,} bytes; expected less than 2 GiB in a program: pass beside=True")
    name = path[: -len(SUFFIX)] + ".safetensors"
    if beside and os.path.exists(name) and not _holds_weights(name):
        raise UserError(
            f"{name} exists and is not the weights of a program; expected none of this name: choose another name"
        )
    exported = _exported(network, size, platforms, beside, probabilities)
    files, notes = {path: bytes(exported.serialize())}, tuple[str, ...]()
    if beside:
        files[name] = safetensors.numpy.save(weights, own_metadata(network))
        notes = (f"the weights are in {name}, for this program only",)
    _write_all(files)
    return notes


def _exported(
    network: Loaded, size: int | str | None, platforms: Sequence[str], beside: bool, probabilities: bool
) -> export.Exported:
    """Return the program, traced with a symbolic number of images."""
    if unknown := [name for name in platforms if name not in PLATFORMS] or not platforms:
        raise UserError(f"platforms are {list(platforms)}; expected some of {', '.join(PLATFORMS)}, not {unknown}")
    images = _image_shape(network, size)
    model, variables = network.model, network.variables
    outputs_mean = network.outputs or "softmax"

    def outputs(variables: Any, images: jax.Array) -> Any:
        logits: Any = model.apply(variables, images)
        if not probabilities or outputs_mean == "values":
            return logits
        return jax.nn.softmax(logits) if outputs_mean == "softmax" else jax.nn.sigmoid(logits)

    try:
        if beside:
            shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in _named(variables).items()}
            program = jax.jit(lambda weights, images: outputs(_nested(weights), images))
            return export.export(program, platforms=tuple(platforms))(shapes, images)
        return export.export(jax.jit(lambda images: outputs(variables, images)), platforms=tuple(platforms))(images)
    except ValueError as error:  # the network's own message, such as one that names the smallest size
        raise UserError(f"cannot export {model.column} at size {size}: {first_line(error)}") from None


def _image_shape(network: Loaded, size: int | str | None) -> jax.ShapeDtypeStruct:
    """Return the shape of the images, with a symbolic number, and with symbolic sides for the size "any"."""
    model = network.model
    smallest, channels = model.smallest_image(), network.variables["params"]["conv1_1"]["kernel"].shape[2]
    if size is None:
        if network.preprocessing is None:
            raise UserError(
                'the network states no preprocessing; expected the size of the images: pass size=224 or "any"'
            )
        size = network.preprocessing.crop
    if size != "any" and not (isinstance(size, int) and size >= smallest):
        raise UserError(f'size is {size!r}; expected {smallest} pixels or more, or "any"')
    if size == "any":
        if model.head_pool == "max" or network.sides is not None:
            which = 'head_pool="max"' if model.head_pool == "max" else f"{network.sides} pixels a side"
            raise UserError(f"a network with {which} takes no images of any size; expected a fixed size: pass size=224")
        limits = [f"{side} >= {smallest}" for side in ("h", "w")]
        shape = export.symbolic_shape(f"n, h, w, {channels}", constraints=limits)
    else:
        shape = export.symbolic_shape(f"n, {size}, {size}, {channels}")
    is_double = np.dtype(model.dtype) == np.float64
    return jax.ShapeDtypeStruct(shape, np.float64 if is_double else np.float32)


def _named(variables: Any) -> dict[str, np.ndarray]:
    """Return the arrays under names such as params/conv1_1/kernel."""
    return {
        f"{collection}/{layer}/{leaf}": np.asarray(array)
        for collection, layers in variables.items()
        for layer, leaves in layers.items()
        for leaf, array in leaves.items()
    }


def _holds_weights(path: str) -> bool:
    """Return whether a file has the names of `_named`, so that it was written beside a program."""
    with contextlib.suppress(safetensors.SafetensorError, OSError), safetensors.safe_open(path, "np") as file:
        return all(name.startswith(("params/", "batch_stats/")) for name in file.keys())  # noqa: SIM118 - not a dict
    return False


def _nested(weights: dict[str, Any]) -> dict[str, Any]:
    """Return the variables of arrays with names; the inverse of `_named`."""
    variables: dict[str, Any] = {}
    for name, array in weights.items():
        collection, layer, leaf = name.split("/")
        variables.setdefault(collection, {}).setdefault(layer, {})[leaf] = array
    return variables


def _write_all(files: dict[str, bytes]) -> None:
    """Write files beside their final names first, so that a failure leaves the old ones."""
    suffix = f".{uuid.uuid4().hex}.partial"
    try:
        for path, content in files.items():
            with open(path + suffix, "wb") as file:
                file.write(content)
        for path in files:
            os.replace(path + suffix, path)
    except OSError as error:
        raise UserError(f"cannot write {next(iter(files))}: {error}; choose a folder that can be written") from None
    finally:
        for path in files:
            with contextlib.suppress(OSError):
                os.remove(path + suffix)  # it has its final name if all went well
