"""Files of Keras: legacy .h5, .weights.h5 and .keras, read with h5py and json. Nothing in them is executed.

A legacy file has a group for each layer, whose attribute `weight_names` orders its arrays. A `.weights.h5` file of
Keras 3 has groups such as `layers/conv2d_1/vars/0`, which are called after classes; a layer's own name is an attribute
of `vars`. A `.keras` file is an archive of such a file and the network's configuration.
"""

import contextlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vgg_jax.errors import UserError, require
from vgg_jax.weights.contents import ZIP_ERRORS, is_zip
from vgg_jax.weights.hdf5_probe import check_structure
from vgg_jax.weights.keras_configs import MODELS, Step, steps_of
from vgg_jax.weights.keras_writer import METADATA
from vgg_jax.weights.prefixes import natural_key

MOST_ITEMS = 20_000  # groups and arrays of one file; VGG-19 has about 100
LARGEST_CONFIG = 16 * 2**20  # bytes of JSON
NOT_WEIGHTS = ("optimizer", "optimizer_weights", "metrics", "loss_tracker", "top_level_model_weights")
MEMBERS = ("config.json", "model.weights.h5")  # of a .keras archive


class KerasLayer(NamedTuple):
    """One layer as a file holds it."""

    name: str
    kind: str  # its class in Keras' snake case, such as conv2d, as far as the file states it
    arrays: tuple[np.ndarray, ...] = ()
    settings: Mapping[str, Any] = {}  # of the configuration; empty if the file has none
    container: tuple[str, ...] = ()  # the names of the models around it
    group: tuple[str, ...] = ()  # the names of its group in a file of Keras 3


class KerasFile(NamedTuple):
    """The content of a file."""

    layers: list[KerasLayer]  # in the order of the computation if the configuration is known, else in the file's
    has_config: bool  # whether the file holds the configuration
    is_ordered: bool  # whether the order of the layers is that of the computation
    front: tuple[str, ...] = ()  # what the network does with its input before its chain of layers
    loss: Any = None  # the configuration of the loss, if it is known
    metadata: Mapping[str, str] = {}  # what vgg_jax stated in the file; empty for files of others


def is_keras_archive(path: str) -> bool:
    """Return whether the file is an archive with the members of a .keras file."""
    with contextlib.suppress(*ZIP_ERRORS), zipfile.ZipFile(path) as archive:
        return set(MEMBERS) <= set(archive.namelist())
    return False


def read_keras_file(path: str) -> KerasFile:
    """Read a file of any of Keras' formats, without Keras.

    Args:
      path: the file.

    Returns:
      Its layers, with their arrays and, if the file states them, their settings.

    Raises:
      UserError: if the file is damaged, refers to other files, or claims to be larger than it is.
    """
    h5py = require("h5py", "keras")
    try:
        if not is_keras_archive(path):
            if is_zip(path):
                raise UserError(f"an archive without {' and '.join(MEMBERS)}; expected one that Keras 3 wrote")
            _check_structure(path)
            with h5py.File(path, "r") as file:
                return _read(file, os.path.getsize(path), None)
        config, weights = _members(path)
        _check_structure(path)
        with h5py.File(io.BytesIO(weights), "r") as file:
            return _read(file, len(weights), json.loads(config))
    except UserError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, MemoryError) as error:
        raise UserError(
            f"not a whole file of Keras weights ({type(error).__name__}: {str(error)[:100]}); download or save it again"
        ) from None


def _check_structure(path: str) -> None:
    """Raise UserError if the HDF5 library hangs or crashes on the file."""
    if not check_structure(path):
        raise UserError("damaged: the HDF5 library does not get through its structure; download or save it again")


def _members(path: str) -> tuple[bytes, bytes]:
    """Return the configuration and the weights in a .keras archive."""
    with zipfile.ZipFile(path) as archive:
        infos = [archive.getinfo(name) for name in MEMBERS]
        if sum(info.file_size for info in infos) > os.path.getsize(path) or infos[0].file_size > LARGEST_CONFIG:
            raise UserError("an archive whose members are compressed; expected one that Keras wrote, uncompressed")
        config, weights = (archive.read(info) for info in infos)
        return config, weights


def _read(file: Any, size: int, config: Any) -> KerasFile:
    """Return the content of an open HDF5 file of `size` bytes; `config` is that of a .keras archive."""
    datasets = _Datasets(size)
    root = dict(datasets.groups(file, 1)).get("model_weights", file)
    training = None
    if config is None and "model_config" in file.attrs:
        config = json.loads(_text(file.attrs["model_config"]))
        training = json.loads(_text(file.attrs["training_config"])) if "training_config" in file.attrs else None
    elif config is not None:
        training = config.get("compile_config")
    legacy = any("weight_names" in group.attrs for _, group in datasets.groups(root, 1))
    units = _legacy_layers(root, datasets) if legacy else _keras3_layers(root, datasets)
    if _text(file.attrs.get("backend", root.attrs.get("backend", ""))) == "theano":
        # Theano's convolution flips its kernels, so Keras flips them when another backend reads the file.
        units = [
            unit._replace(arrays=tuple(a[::-1, ::-1] if a.ndim == 4 else a for a in unit.arrays)) for unit in units
        ]
    if config is None or config["class_name"] not in MODELS:  # a class of the user's, whose layers are not stated
        is_ordered = legacy and ("layer_names" in root.attrs or "layer_names0" in root.attrs)
        return KerasFile(units, False, is_ordered, metadata=_metadata(file))
    steps, front = steps_of(config)
    loss = training.get("loss") if isinstance(training, dict) else None
    return KerasFile(_joined(steps, units), True, True, tuple(front), loss)


def _metadata(file: Any) -> dict[str, str]:
    """Return what vgg_jax stated in the file; empty if it wrote none or something else has that name."""
    if METADATA not in file or type(file.get(METADATA, getlink=True)).__name__ != "HardLink":
        return {}
    stored = file[METADATA]
    if hasattr(stored, "keys") or stored.dtype != np.uint8 or stored.nbytes > LARGEST_CONFIG or stored.external:
        return {}
    stated = json.loads(np.asarray(stored).tobytes())
    return {k: v for k, v in stated.items() if isinstance(v, str)} if isinstance(stated, dict) else {}


class _Datasets:
    """A reader of arrays that trusts nothing: no links, no other files, no more bytes than the file has."""

    def __init__(self, size: int) -> None:
        self.bytes_left = size
        self.items_left = MOST_ITEMS

    def groups(self, group: Any, depth: int) -> Iterator[tuple[str, Any]]:
        """Yield the name and the group of each child that is a group, in natural order, or of none at depth 0."""
        for name in sorted(group, key=natural_key) if depth else ():
            self.items_left -= 1
            if self.items_left < 0:
                raise UserError(f"holds more than {MOST_ITEMS:,} groups; expected the weights of a VGG")
            if type(group.get(name, getlink=True)).__name__ != "HardLink":
                raise UserError(f"holds a link {name!r}; expected arrays: save the weights with Keras again")
            if name not in NOT_WEIGHTS and hasattr(group[name], "keys"):
                yield name, group[name]

    def array(self, group: Any, name: str) -> np.ndarray:
        """Return an array of a group."""
        parts = name.strip("/").split("/")
        for part in parts:
            if not hasattr(group, "keys") or type(group.get(part, getlink=True)).__name__ != "HardLink":
                raise UserError(f"holds no array {name!r}, or a link in its place; save the weights with Keras again")
            group = group[part]
        if hasattr(group, "keys"):
            raise UserError(f"holds a group in place of the array {name!r}; save the weights with Keras again")
        stored = group.id.get_storage_size()
        self.bytes_left -= group.nbytes
        if group.is_virtual or group.external or group.nbytes > stored or self.bytes_left < 0:
            raise UserError(
                f"{name} claims {group.nbytes:,} bytes and stores {stored:,}; expected uncompressed arrays in the file "
                "itself: save the weights with Keras again"
            )
        if group.attrs.get("dtype") == "bfloat16":
            return np.asarray(group).view(ml_dtypes.bfloat16)
        if group.dtype.kind != "f":
            raise UserError(
                f"{name} is {group.dtype}; expected floats: load and save the network in float32 with Keras"
            )
        return np.asarray(group)


def _legacy_layers(root: Any, datasets: _Datasets) -> list[KerasLayer]:
    """Return the layers of a file whose groups list their `weight_names`; nested models are flattened."""
    groups = dict(datasets.groups(root, 1))
    stated = [name for name in _names(root, "layer_names") if name in groups]
    layers = []
    for top in stated or groups:
        members: dict[str, list[np.ndarray]] = {}
        for name in _names(groups[top], "weight_names"):
            # vgg16/block1_conv1/kernel:0 belongs to block1_conv1; block1_conv1_W_1:0 has no layer in its name.
            parts = name.strip("/").split("/")
            members.setdefault(parts[-2] if len(parts) > 1 else top, []).append(datasets.array(groups[top], name))
        if len(members) < 2:  # a layer: what its variables are called does not matter
            members = {top: [array for arrays in members.values() for array in arrays]}
        layers += [
            KerasLayer(name, base_name(name), tuple(arrays), container=(top,) if len(members) > 1 else ())
            for name, arrays in members.items()
        ]
    return layers


def _keras3_layers(root: Any, datasets: _Datasets) -> list[KerasLayer]:
    """Return the layers of a file of Keras 3 under their names, in the natural order of their groups."""
    layers = []

    def walk(group: Any, path: tuple[str, ...], names: tuple[str, ...], depth: int) -> None:
        for name, child in datasets.groups(group, depth):
            if name == "vars":
                if path:
                    arrays = [datasets.array(child, key) for key in sorted(child, key=natural_key)]
                    layers.append(KerasLayer(names[-1], base_name(path[-1]), tuple(arrays), {}, names[:-1], path))
                continue
            if name == "layers":
                walk(child, path, names, depth - 1)
            else:
                variables = dict(datasets.groups(child, 1)).get("vars", child)
                walk(child, (*path, name), (*names, _text(variables.attrs.get("name", name))), depth - 1)

    walk(root, (), (), 24)
    return [layer for layer in layers if not _is_model(layer, layers)]


def _is_model(layer: KerasLayer, layers: list[KerasLayer]) -> bool:
    return not layer.arrays and any(layer.name in other.container for other in layers)


def _joined(steps: list[Step], units: list[KerasLayer]) -> list[KerasLayer]:
    """Return the steps of a configuration with the arrays that a file has for them."""
    by_name = {(*unit.container, unit.name): unit for unit in units if unit.arrays}
    by_ends = {(path[0], path[-1]): unit for path, unit in by_name.items()}
    by_group = {unit.group: unit for unit in units if unit.arrays and unit.group}

    def found(step: Step) -> KerasLayer | None:
        return by_name.get(step.path) or by_ends.get((step.path[0], step.path[-1]))

    # Keras 3 before 3.8 does not state the names, and its groups are called after classes.
    unnamed = all(path[-1] == unit.name for path, unit in by_group.items())
    by_class = by_group and unnamed and by_group.keys() <= {step.auto for step in steps}
    layers = []
    for step in steps:
        unit = by_group.get(step.auto) if by_class else found(step)
        arrays = unit.arrays if unit else ()
        layers.append(KerasLayer(step.path[-1], step.kind, arrays, step.settings, step.path[:-1]))
    return layers


def base_name(name: str) -> str:
    """Return a layer's name without the numbers that Keras appends: conv2d of conv2d_12."""
    return re.sub(r"(_\d+)+$", "", name)


def _names(group: Any, attribute: str) -> list[str]:
    """Return a list of names among the attributes; Keras splits a long one into attributes with numbers."""
    parts = [name for name in group.attrs if re.fullmatch(rf"{attribute}\d*", name)]
    return [_text(name) for part in sorted(parts, key=natural_key) for name in group.attrs[part]]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
