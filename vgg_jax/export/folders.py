"""Folders with `config.json`, `model.safetensors` and a model card: in timm's shape, or in our own."""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.numpy

from vgg_jax.errors import UserError
from vgg_jax.export.card import Measured, model_card
from vgg_jax.export.timm_configs import inexpressible, label_names, to_config, with_config
from vgg_jax.weights.cleaning import timm_names
from vgg_jax.weights.formats import Announce, Loaded, load_file, own_metadata
from vgg_jax.weights.layouts import to_torch

CONFIG, CARD, WEIGHTS = "config.json", "README.md", "model.safetensors"
WEIGHT_FILES = (WEIGHTS, "pytorch_model.bin")  # the first that exists is read, as timm does
PREFIX = "hf-hub:"  # of a repository of the hub, as timm writes it
LIBRARY = "vgg_jax"  # `library_name` of folders that we write; timm ignores it
LARGEST_CONFIG = 16 * 2**20  # bytes


def is_network_folder(path: str) -> bool:
    """Return whether a path is a folder with weights and `config.json`, and not the directory of a run."""
    return (
        os.path.isfile(os.path.join(path, CONFIG))
        and not os.path.exists(os.path.join(path, "checkpoints"))
        and weights_in(path) is not None
    )


def weights_in(path: str) -> str | None:
    """Return the path of the weights in a folder, or None."""
    files = [os.path.join(path, name) for name in WEIGHT_FILES]
    return next((file for file in files if os.path.isfile(file)), None)


def write_folder(
    path: str,
    network: Loaded,
    card: str | None = None,
    name: str | None = None,
    measured: Measured | None = None,
) -> tuple[str, ...]:
    """Write a network's folder, which appears complete or not at all.

    Args:
      path: the folder; it must be missing or empty.
      network: the network.
      card: the model card; by default one that states what the network carries.
      name: the title of that card; by default the name of the folder.
      measured: the figures that this card states.

    Returns:
      Notes: what was changed for timm, or why timm does not read the folder.

    Raises:
      UserError: if the folder holds files, its parent is missing, it cannot be written, or both `card` and `measured`
        are given.
    """
    check_folder(path)
    if card is not None and measured is not None:
        raise UserError("found both a card and measured figures; expected one of them: put the figures into the card")
    path = os.path.abspath(path)
    missing, notes = inexpressible(network), tuple[str, ...]()
    if missing is None:
        rgb = _in_rgb(network)
        if rgb is not network:
            notes = ("the channels are saved in the order RGB, because timm has no BGR; the function is the same",)
        network = rgb
        arrays = to_torch(network.model, network.variables)
        arrays = arrays if network.model.conv_head else timm_names(arrays, network.model.pool_size)
        config = to_config(network) | {"library_name": LIBRARY}
    else:
        notes = (f"timm has no {missing}: saved in the shape of vgg_jax, which timm does not read",)
        arrays, config = to_torch(network.model, network.variables), _own_config(network)
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        os.mkdir(partial)
        weights = os.path.join(partial, WEIGHTS)
        safetensors.numpy.save_file(arrays, weights, own_metadata(network))
        title = name or os.path.basename(path)
        text = card or model_card(network, title, missing is None, _sha256(weights), measured)
        for file_name, content in ((CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n"), (CARD, text)):
            with open(os.path.join(partial, file_name), "w", encoding="utf-8") as file:
                file.write(content)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(path)  # it is empty
        os.rename(partial, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}; choose a folder that can be written") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # it has its final name if all went well
    return notes


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_folder(path: str) -> None:
    """Raise UserError if `write_folder` could not write to `path`: it holds files, or its parent is missing."""
    path = os.path.abspath(path)
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        raise UserError(f"{parent}, the folder of {os.path.basename(path)}, does not exist; create it first")
    if os.path.lexists(path) and not os.path.isdir(path):
        raise UserError(f"{path} is a file; expected a folder: choose another path")
    if os.path.isdir(path) and (found := sorted(os.listdir(path))):
        raise UserError(f"{path} holds {found[0]}; expected an empty folder or none: choose another folder")


def read_folder(path: str, features_only: bool = False, announce: Announce | None = None) -> Loaded:
    """Load a network from a folder in timm's shape or in ours.

    Args:
      path: the folder. It holds `config.json` and `model.safetensors` or `pytorch_model.bin`.
      features_only: as for `formats.load_file`.
      announce: as for `formats.load_file`.

    Returns:
      The network. A folder that vgg_jax wrote gives the fields that were saved; timm's gives timm's head, and the
      preprocessing and label names of `config.json`.

    Raises:
      UserError: if a file is missing or damaged, or `config.json` does not fit the weights.
    """
    weights = weights_in(path)
    if weights is None:
        raise UserError(f"{path} holds no weights; expected {' or '.join(WEIGHT_FILES)}: download the folder again")
    config = _read_config(os.path.join(path, CONFIG))
    is_own = _is_own(weights)

    def completed(loaded: Loaded) -> Loaded:
        try:
            return _with_own_config(loaded, config) if is_own else with_config(loaded, config)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    return completed(load_file(weights, features_only, announce and (lambda loaded: announce(completed(loaded)))))


def _with_own_config(loaded: Loaded, config: Mapping[str, Any]) -> Loaded:
    """Return a network that states everything itself, with the label names of `config.json` if these were edited."""
    names = label_names(config, loaded.model.num_classes)
    if names is None or names == loaded.classes:
        return loaded
    note = f"{CONFIG} has other label names than {WEIGHTS}: those of {CONFIG} are used"
    return loaded._replace(classes=names, notes=(*loaded.notes, note))


def _own_config(network: Loaded) -> dict[str, Any]:
    """Return the content of `config.json` for a network that timm has no name for; it repeats the file's metadata."""
    config: dict[str, Any] = {"library_name": LIBRARY, "num_classes": network.model.num_classes or 0}
    if network.classes is not None:
        config["label_names"] = list(network.classes)
    for name, text in own_metadata(network).items():
        if name != "classes":
            config[name] = json.loads(text) if text[:1] in ("{", "[") else text
    return config


def _in_rgb(network: Loaded) -> Loaded:
    """Return the same function with the channels of its images in the order RGB."""
    preprocessing = network.preprocessing
    if preprocessing is None or preprocessing.channel_order != "BGR":
        return network
    first = network.variables["params"]["conv1_1"]
    params = {**network.variables["params"], "conv1_1": {**first, "kernel": first["kernel"][:, :, ::-1]}}
    fields = {"mean": preprocessing.mean[::-1], "std": preprocessing.std[::-1], "channel_order": "RGB"}
    return network._replace(
        variables={**network.variables, "params": params},
        preprocessing=type(preprocessing)(**{**vars(preprocessing), **fields}),
    )


def _read_config(path: str) -> dict[str, Any]:
    """Return the content of a `config.json`."""
    try:
        if os.path.getsize(path) > LARGEST_CONFIG:
            raise ValueError(f"{os.path.getsize(path):,} bytes; expected at most {LARGEST_CONFIG:,}")
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
        if not isinstance(config, dict) or not isinstance(config.get("pretrained_cfg", {}), dict):
            raise ValueError("no objects of JSON")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not timm's config.json: {error}; download the folder again") from None
    return config


def _is_own(path: str) -> bool:
    """Return whether vgg_jax wrote a file of weights, so that it states everything itself."""
    with contextlib.suppress(safetensors.SafetensorError, OSError), safetensors.safe_open(path, "np") as file:
        return "vgg" in (file.metadata() or {})
    return False
