"""File formats of weights: .pth, .safetensors, Keras' and ONNX files, each an entry of the table FORMATS."""

import contextlib
import dataclasses
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import safetensors.numpy

from vgg_jax.data.preprocessing import FEATURES, IMAGENET, Preprocessing
from vgg_jax.errors import UserError
from vgg_jax.model import VGG
from vgg_jax.weights.cleaning import torchvision_names
from vgg_jax.weights.contents import ZIP_ERRORS, describe_content
from vgg_jax.weights.imagenet_classes import imagenet_classes, is_imagenets
from vgg_jax.weights.keras_files import is_keras_archive, read_keras_file
from vgg_jax.weights.keras_networks import from_keras
from vgg_jax.weights.keras_writer import write_keras
from vgg_jax.weights.layouts import fits, to_torch, to_variables, variable_shapes
from vgg_jax.weights.metadata import Stated, attached_to, from_json, to_json
from vgg_jax.weights.onnx_facts import onnx_facts
from vgg_jax.weights.onnx_files import is_onnx, read_onnx_file
from vgg_jax.weights.onnx_networks import from_onnx
from vgg_jax.weights.pickles import read_content, write_tensors
from vgg_jax.weights.state_dicts import Reading, read_checkpoint, read_state_dict
from vgg_jax.weights.tensor_file import open_tensor_file

OTHER_NETWORK = "the network that vgg_jax described in the file is another one; read off the tensors instead"


class Loaded(NamedTuple):
    """A network as a file holds it."""

    model: VGG
    variables: Mapping[str, Any]  # of jax.ShapeDtypeStruct as long as they are `unread`
    preprocessing: Preprocessing | None = None  # of the images; None if the file does not state it
    classes: tuple[str, ...] | None = None  # the names of the classes, if they are known
    outputs: str | None = None  # what the logits mean: softmax, sigmoid or values; None if the file does not state it
    notes: tuple[str, ...] = ()  # what the reader assumed, unwrapped, renamed or left out, one line each
    sides: range | None = None  # sides of square images for which the file's network is defined; None: any
    unread: Callable[[], Mapping[str, Any]] | None = None  # reads the variables; None: they have been read


Forget = Callable[[], None]  # removes what has been read from memory
Announce = Callable[[Loaded], None]  # gets the network before its variables are read


@dataclasses.dataclass(frozen=True)
class Format:
    """One file format of weights."""

    name: str
    suffixes: tuple[str, ...]
    matches: Callable[[str], bool]  # whether the content of the file at a path is of this format
    # From the path and whether to leave out the head if it is unknown; raises UserError without the path, which
    # `load_file` puts in front.
    read: Callable[[str, bool], Loaded]
    write: Callable[[str, Loaded], None] | None = None
    written: tuple[str, ...] = ()  # the ends of names that `write` is for


def load_file(path: str | os.PathLike[str], features_only: bool = False, announce: Announce | None = None) -> Loaded:
    """Load a network from a file of any format in FORMATS.

    The content decides the format; the suffix counts only for a file whose content is unknown. Depth, batch norm,
    classes and head are read off the file; the notes name what was unwrapped, renamed or assumed. PyTorch's files need
    torch 2.10 or newer and are read with `weights_only=True`: nothing in them is executed.

    Args:
      path: the file.
      features_only: leave out names that belong to no known head, where the file is refused otherwise. A head that is
        known is read all the same.
      announce: called, except for Keras' files, with the network before its variables are read: instead of these, it
        has their shapes.

    Returns:
      The network, and what the file states about its images and classes.

    Raises:
      UserError: if the file is missing, damaged or of another kind, or its weights are not a VGG's; the message lists
        every mismatch.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; expected a {_suffixes(FORMATS, 'or')} file")
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; expected a {_suffixes(FORMATS, 'or')} file")
    suffix = os.path.splitext(path)[1].lower()
    by_content = [entry for entry in FORMATS if entry.matches(path)]
    by_suffix = [entry for entry in FORMATS if suffix in entry.suffixes]
    if description := describe_content(path):
        raise UserError(f"{path} is {description}; expected a {_suffixes(FORMATS, 'or')} file")
    if not by_content + by_suffix:
        size = os.path.getsize(path)
        raise UserError(
            f"{path} has {size:,} bytes of no known format, whatever its name; expected a {_suffixes(FORMATS, 'or')} "
            "file: download it again, or convert it"
        )
    try:
        loaded = (by_content + by_suffix)[0].read(path, features_only)
        if loaded.unread is None:
            return loaded
        if announce is not None:
            announce(loaded)
        return loaded._replace(variables=loaded.unread(), unread=None)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def without_head(loaded: Loaded) -> Loaded:
    """Return the convolutional part of a network, without classes and bounds of the image size."""
    head = loaded.model.head_layers
    params = {name: leaves for name, leaves in loaded.variables["params"].items() if name not in head}
    return loaded._replace(
        model=loaded.model.clone(num_classes=None, hidden=(), conv_head=False),
        variables={**loaded.variables, "params": params},
        classes=None,
        sides=None,
    )


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
    write_atomically(path, lambda partial: write(partial, network))


def write_atomically(path: str, write: Callable[[str], None]) -> None:
    """Write a file under another name first, so that it appears complete or not at all.

    Args:
      path: the file, which is overwritten if it exists.
      write: called with the path of the file to write.

    Raises:
      UserError: if the folder does not exist, or the file cannot be written.
    """
    check_parent_folder(path)
    partial = f"{path}.partial"
    try:
        write(partial)
        os.replace(partial, path)
    except Exception as error:  # the libraries raise several kinds if the disk is full or read-only
        with contextlib.suppress(OSError):
            os.remove(partial)
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot write {path}: {error}") from None


def check_target(path: str | os.PathLike[str], others: Sequence[str] = ()) -> None:
    """Raise UserError if `save_file` could not write to `path`; `others` are suffixes that the caller writes itself."""
    _writer(os.fspath(path), others)


def _writer(path: str, others: Sequence[str] = ()) -> Callable[[str, Loaded], None]:
    """Return the function that writes the file at `path`, after checking the suffix and the folder."""
    writers = [entry.write for entry in FORMATS if entry.write and path.lower().endswith(entry.written)]
    if not writers:
        suffix = os.path.splitext(path)[1]
        ends = [*(end for entry in FORMATS for end in entry.written), *others]
        raise UserError(f"{path} ends in {suffix!r}; expected {', '.join(ends[:-1])} or {ends[-1]}")
    check_parent_folder(path)
    return writers[0]


def check_parent_folder(path: str) -> None:
    """Raise UserError if the folder of a file to write does not exist."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise UserError(f"{folder}, the folder of {os.path.basename(path)}, does not exist; create it first")


def _suffixes(formats: list[Format], conjunction: str) -> str:
    suffixes = [suffix for entry in formats for suffix in entry.suffixes]
    return f"{', '.join(suffixes[:-1])} {conjunction} {suffixes[-1]}"


def _head(path: str, length: int) -> bytes:
    """Return the first bytes of a file; none if it cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(length)
    return b""


def _forget_nothing() -> None:
    """Do nothing."""


def _from_arrays(arrays: Mapping[str, Any], model: VGG, forget: Forget) -> Loaded:
    """Return the network of arrays, which are not read yet; reading raises UserError if numbers are not finite."""

    def read() -> Mapping[str, Any]:
        return to_variables(arrays, model, check_finite=True, forget=forget)

    return Loaded(model, variable_shapes(arrays, model), unread=read)


def _from_reading(reading: Reading, features_only: bool, forget: Forget = _forget_nothing) -> Loaded:
    """Return the network of a state dict that states neither its preprocessing nor its classes."""
    loaded = _from_arrays(reading.arrays, reading.model, forget)
    model = reading.model
    preprocessing, classes, notes = None, None, reading.notes
    if reading.was_empty:
        preprocessing = FEATURES
    elif reading.is_own and is_imagenets(model, loaded.variables["params"]["conv1_1"]["kernel"].shape[2]):
        preprocessing, classes = IMAGENET, None if features_only else imagenet_classes()
        layout = "timm's" if model.conv_head else "torchvision's"
        notes = (*notes, f"{layout} layout with 1000 classes: taken for ImageNet's preprocessing and classes")
    if model.conv_head:
        notes = (
            *notes,
            "the names are timm's, so the head is timm's (conv_head=True); it differs from torchvision's except at "
            "224x224 pixels",
        )
    return loaded._replace(preprocessing=preprocessing, classes=classes, notes=notes)


def own_metadata(network: Loaded) -> dict[str, str]:
    """Return the strings that a file of ours states beside its arrays."""
    return to_json(Stated(network.model, network.preprocessing, network.classes, network.outputs, network.sides))


def _stated(metadata: Mapping[str, str], arrays: Mapping[str, Any]) -> Stated | None:
    """Return what a file of ours states; None for a file of others."""
    first = arrays.get("features.0.weight")
    return from_json(metadata, None if first is None else first.dtype)


def _from_own(arrays: Mapping[str, Any], stated: Stated, forget: Forget = _forget_nothing) -> Loaded:
    loaded = _from_arrays(torchvision_names(arrays), stated.model, forget)
    return loaded._replace(
        preprocessing=stated.preprocessing, classes=stated.classes, outputs=stated.outputs, sides=stated.sides
    )


# --- .pth: a state dict of PyTorch


def _is_pth(path: str) -> bool:
    """Return whether the file is an archive of torch.save or, as before PyTorch 1.6, a bare pickle."""
    head = _head(path, 4)
    if head.startswith(b"PK\x03\x04"):
        with contextlib.suppress(*ZIP_ERRORS), zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
        return False
    return head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")  # the protocols of pickle


def _read_pth(path: str, features_only: bool) -> Loaded:
    content = read_content(path)
    notes: tuple[str, ...] = ()
    if metadata := attached_to(content):
        arrays = torchvision_names(content)
        if own := _stated(metadata, arrays):
            try:
                return _from_own(arrays, own)
            except UserError:  # someone has replaced tensors, such as those of the last layer, and kept the rest
                notes = (OTHER_NETWORK,)
    loaded = _from_reading(read_checkpoint(content, features_only), features_only)
    return loaded._replace(notes=(*notes, *loaded.notes))


def _write_pth(path: str, network: Loaded) -> None:
    write_tensors(path, to_torch(network.model, network.variables), own_metadata(network))


# --- .safetensors: names of torchvision or timm; our files have metadata


def _is_safetensors(path: str) -> bool:
    """Return whether the file begins with the length of a JSON header and the header."""
    head = _head(path, 9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < os.path.getsize(path)


def _read_safetensors(path: str, features_only: bool) -> Loaded:
    arrays, metadata, forget = open_tensor_file(path)
    if own := _stated(metadata, arrays):
        return _from_own(arrays, own, forget)
    return _from_reading(read_state_dict(arrays, features_only, keeps_order=False), features_only, forget)


def _write_safetensors(path: str, network: Loaded) -> None:
    safetensors.numpy.save_file(to_torch(network.model, network.variables), path, own_metadata(network))


# --- Keras: legacy .h5, .weights.h5 and .keras


def _is_keras(path: str) -> bool:
    return _head(path, 8) == b"\x89HDF\r\n\x1a\n" or is_keras_archive(path)


def _read_keras(path: str, features_only: bool) -> Loaded:
    if "th_kernels" in os.path.basename(path):
        raise UserError(
            "the name says that Theano flipped the kernels, which the content does not state; expected the file whose "
            "name ends in tf_kernels.h5: use that one"
        )
    file = read_keras_file(path)
    loaded = Loaded(**from_keras(file, features_only)._asdict())
    params = loaded.variables["params"]
    stated = from_json(file.metadata, params["conv1_1"]["kernel"].dtype) if file.metadata else None
    if stated and not features_only:
        if fits(params, stated.model):
            return Loaded(stated.model, loaded.variables, *stated[1:4], sides=stated.sides)
        loaded = loaded._replace(notes=(OTHER_NETWORK, *loaded.notes))
    is_authors = loaded.preprocessing is not None and loaded.model.num_classes == 1000
    return loaded._replace(classes=imagenet_classes()) if is_authors else loaded


def _write_keras(path: str, network: Loaded) -> None:
    write_keras(path, network.model, network.variables, own_metadata(network))


# --- ONNX: graphs of vgg_jax and others


def _read_onnx(path: str, features_only: bool) -> Loaded:
    file = read_onnx_file(path)
    network = from_onnx(file, features_only)
    facts = onnx_facts(file, network, features_only)
    return _from_arrays(network.arrays, facts.model, _forget_nothing)._replace(**facts._asdict())


FORMATS = [
    Format("PyTorch", (".pth", ".pt"), _is_pth, _read_pth, _write_pth, (".pth", ".pt")),
    Format("safetensors", (".safetensors",), _is_safetensors, _read_safetensors, _write_safetensors, (".safetensors",)),
    Format("Keras", (".h5", ".hdf5", ".keras"), _is_keras, _read_keras, _write_keras, (".weights.h5",)),
    Format("ONNX", (".onnx",), is_onnx, _read_onnx),
]
