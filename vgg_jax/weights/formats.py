"""File formats of weights: .pth, .safetensors and Keras' .h5, each an entry of the table FORMATS."""

import collections
import contextlib
import dataclasses
import os
import stat
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from vgg_jax.data.preprocessing import AUTHORS, FEATURES, IMAGENET, Preprocessing
from vgg_jax.errors import UserError, first_line, require
from vgg_jax.model import VGG
from vgg_jax.weights.cleaning import torchvision_names, unwrap, without_empty_classifier
from vgg_jax.weights.layouts import Variables, from_keras, from_torch, to_torch
from vgg_jax.weights.metadata import Stated, attach_to, attached_to, from_json, to_json

LARGEST = 4 * 2**30  # bytes of one file's arrays: a VGG-19 in float64 has 1.15 GB


class Loaded(NamedTuple):
    """A network as a file holds it."""

    model: VGG
    variables: Mapping[str, Any]
    preprocessing: Preprocessing | None = None  # of the images; None if the file does not state it
    classes: tuple[str, ...] | None = None  # the names of the classes, if they are known
    outputs: str | None = None  # what the logits mean: softmax, sigmoid or values; None if the file does not state it
    notes: tuple[str, ...] = ()  # what the reader assumed, unwrapped, renamed or left out, one line each


@dataclasses.dataclass(frozen=True)
class Format:
    """One file format of weights."""

    name: str
    suffixes: tuple[str, ...]
    matches: Callable[[str], bool]  # whether the content of the file at a path is of this format
    read: Callable[[str], Loaded]  # raises UserError without the path, which `load_file` puts in front
    write: Callable[[str, Loaded], None] | None = None


def load_file(path: str | os.PathLike[str]) -> Loaded:
    """Load a network from a file of any format in FORMATS.

    The content decides the format; the suffix counts only for a file whose content matches no format. Depth, batch
    norm, classes and head are read off the file. PyTorch's files need torch 2.10 or newer and are read with
    `weights_only=True`: nothing in them is executed.

    Args:
      path: the file.

    Returns:
      The network, and what the file states about its images and classes.

    Raises:
      UserError: if the file is missing, damaged or of another kind, or its weights are not a VGG's; the message lists
        every mismatch.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; expected a {_suffixes(FORMATS, 'or')} file")
    suffix = os.path.splitext(path)[1]
    by_content = [entry for entry in FORMATS if entry.matches(path)]
    by_suffix = [entry for entry in FORMATS if suffix in entry.suffixes]
    if os.path.isdir(path) or not by_content + by_suffix:
        found = "is a folder" if os.path.isdir(path) else f"ends in {suffix!r}, and its content is of no known format"
        raise UserError(f"{path} {found}; expected a {_suffixes(FORMATS, 'or')} file")
    try:
        return (by_content + by_suffix)[0].read(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def save_file(path: str | os.PathLike[str], network: Loaded) -> None:
    """Save a network under torchvision's names. The suffix decides the format; the file appears complete or not at all.

    The file also holds what the network carries: the model's fields, preprocessing, class names and the meaning of the
    outputs. torchvision loads a .pth file, which needs torch, and ignores these.

    Args:
      path: the file, which is overwritten if it exists.
      network: the network.

    Raises:
      UserError: if the suffix is not one of a format that can be written, the variables do not fit the model, or the
        file cannot be written.
    """
    path = os.fspath(path)
    write = _writer(path)
    partial = f"{path}.partial"
    try:
        write(partial, network)
        os.replace(partial, path)
    except Exception as error:  # the libraries raise several kinds if the disk is full or read-only
        with contextlib.suppress(OSError):
            os.remove(partial)
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot write {path}: {error}") from None


def check_target(path: str | os.PathLike[str]) -> None:
    """Raise UserError if `save_file` could not write to `path`: a wrong suffix or a missing folder."""
    _writer(os.fspath(path))


def _writer(path: str) -> Callable[[str, Loaded], None]:
    """Return the function that writes the file at `path`, after checking the suffix and the folder."""
    suffix = os.path.splitext(path)[1]
    writable = [entry for entry in FORMATS if entry.write]
    writers = [entry.write for entry in writable if entry.write and suffix in entry.suffixes]
    if not writers:
        raise UserError(f"{path} ends in {suffix!r}; expected {_suffixes(writable, 'or')}")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UserError(f"{folder}, the folder of {os.path.basename(path)}, does not exist; create it first")
    return writers[0]


def _suffixes(formats: list[Format], conjunction: str) -> str:
    suffixes = [suffix for entry in formats for suffix in entry.suffixes]
    return f"{', '.join(suffixes[:-1])} {conjunction} {suffixes[-1]}"


def _head(path: str, length: int) -> bytes:
    """Return the first bytes of a file; none if it cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(length)
    return b""


def _from_arrays(arrays: Mapping[str, Any], model: VGG | None = None) -> tuple[VGG, Variables]:
    """Return `from_torch` of the arrays; raise UserError if numbers are not finite."""
    model, variables = from_torch(arrays, model)
    bad = [
        "/".join(key.key for key in keys)
        for keys, array in jax.tree_util.tree_leaves_with_path(variables)
        if not jnp.isfinite(array).all()
    ]
    if bad:
        raise UserError(f"holds numbers that are not finite, in {', '.join(bad)}")
    return model, variables


def _own_metadata(network: Loaded) -> dict[str, str]:
    return to_json(Stated(network.model, network.preprocessing, network.classes, network.outputs))


def _stated(metadata: Mapping[str, str], arrays: Mapping[str, Any]) -> Stated | None:
    """Return what a file of ours states; None for a file of others."""
    first = arrays.get("features.0.weight")
    return from_json(metadata, None if first is None else first.dtype)


def _from_own(arrays: Mapping[str, Any], stated: Stated) -> Loaded:
    model, variables = _from_arrays(arrays, stated.model)
    return Loaded(model, variables, stated.preprocessing, stated.classes, stated.outputs)


# --- .pth: a state dict of PyTorch


def _is_pth(path: str) -> bool:
    """Return whether the file is an archive of torch.save or, as before PyTorch 1.6, a bare pickle."""
    head = _head(path, 4)
    if head.startswith(b"PK\x03\x04"):
        with contextlib.suppress(zipfile.BadZipFile, OSError, ValueError), zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
        return False
    return head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")  # the protocols of pickle


def _read_pth(path: str) -> Loaded:
    torch = _import_torch()
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds
        raise UserError(
            f"refused by torch.load(weights_only=True), which executes nothing: {first_line(error)}"
        ) from None
    arrays, was_empty = without_empty_classifier(torchvision_names(unwrap(content)))
    notes: tuple[str, ...] = ()
    if own := _stated(attached_to(content), arrays):
        try:
            return _from_own(arrays, own)
        except UserError:  # someone has replaced tensors, such as those of the last layer, and kept the rest
            notes = ("the network that vgg_jax described in the file is another one; read off the tensors instead",)
    return Loaded(*_from_arrays(arrays), FEATURES if was_empty else IMAGENET, notes=notes)


def _check_archive(path: str) -> None:
    """Raise UserError if the file is a zip archive that torch.save cannot have written."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(f"not a whole archive: {error}") from None
    size = sum(member.file_size for member in members)
    # torch.save stores without compression, so a compressed member is not its work and may be a decompression bomb.
    if size > LARGEST or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UserError(f"an archive of {size:,} bytes, some compressed; expected one that torch.save wrote")
    for member in members:
        outside = member.filename.startswith("/") or ".." in member.filename.split("/")
        if outside or stat.S_ISLNK(member.external_attr >> 16):
            raise UserError(f"an archive with {member.filename!r}, a link or a path outside; expected torch.save's")


def _write_pth(path: str, network: Loaded) -> None:
    torch = _import_torch()
    tensors = collections.OrderedDict(
        (
            name,
            torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            if array.dtype.name == "bfloat16"
            else torch.from_numpy(array),
        )
        for name, array in to_torch(network.model, network.variables).items()
    )
    attach_to(tensors, _own_metadata(network))
    torch.save(tensors, path)


def _import_torch() -> Any:
    torch = require("torch", "torch")
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 10):
        raise UserError(
            f"PyTorch {torch.__version__} can be made to execute the content of a .pth file (CVE-2026-24747); "
            "expected 2.10 or newer: pip install -U torch"
        )
    return torch


# --- .safetensors: names of torchvision or timm; our files have metadata


def _is_safetensors(path: str) -> bool:
    """Return whether the file begins with the length of a JSON header and the header."""
    head = _head(path, 9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < os.path.getsize(path)


def _read_safetensors(path: str) -> Loaded:
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is not a mapping
    except (safetensors.SafetensorError, OSError, MemoryError, ValueError) as error:
        raise UserError(f"not a whole .safetensors file: {error}") from None
    own = _stated(metadata, arrays)
    return _from_own(arrays, own) if own else Loaded(*_from_arrays(arrays), IMAGENET)


def _write_safetensors(path: str, network: Loaded) -> None:
    safetensors.numpy.save_file(to_torch(network.model, network.variables), path, _own_metadata(network))


# --- .h5: Keras' VGG16 and VGG19


def _is_hdf5(path: str) -> bool:
    return _head(path, 8) == b"\x89HDF\r\n\x1a\n"


def _read_keras(path: str) -> Loaded:
    h5py = require("h5py", "keras")
    arrays = {}
    try:
        with h5py.File(path, "r") as file:
            root = file.get("model_weights", file)
            for layer in root:
                names = root[layer].attrs.get("weight_names", [])
                if len(names):
                    arrays[layer] = [np.asarray(root[layer][n if isinstance(n, str) else n.decode()]) for n in names]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"not a whole file of Keras weights: {error}") from None
    return Loaded(*from_keras(arrays), AUTHORS)


FORMATS = [
    Format("PyTorch", (".pth", ".pt"), _is_pth, _read_pth, _write_pth),
    Format("safetensors", (".safetensors",), _is_safetensors, _read_safetensors, _write_safetensors),
    Format("Keras", (".h5",), _is_hdf5, _read_keras),
]
