"""Files of Keras 3 that `keras.applications.VGG16` and `VGG19` read: `.weights.h5`, with and without the top."""

import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from vgg_jax.errors import UserError, require
from vgg_jax.model import VGG

METADATA = "vgg_jax"  # a dataset of bytes at the root, which Keras ignores: the strings of `metadata.to_json` as JSON
DENSE = {"fc6": "fc1", "fc7": "fc2", "fc8": "predictions"}


def check_keras(model: VGG) -> None:
    """Raise UserError if keras.applications has no such network."""
    has_top = len(model.hidden) == 2 and model.num_classes is not None
    problems = [
        (model.depth in (16, 19) and not model.conv1x1, f"depth {model.depth} (column {model.column})"),
        (not model.batch_norm, "batch norm"),
        (model.final_layer is None, f"the end at {model.final_layer}"),
        (model.pool_after == VGG.pool_after, f"pool_after={model.pool_after}"),
        (has_top or (not model.hidden and model.num_classes is None), f"a head with hidden={model.hidden}"),
        (not has_top or model.head_pool == "average", f"head_pool={model.head_pool!r}"),
    ]
    for holds, problem in problems:
        if not holds:
            raise UserError(
                f"keras.applications has no VGG with {problem}; expected VGG-16 or VGG-19 with fc1, fc2 and "
                "predictions, or without a head: save .safetensors"
            )


def write_keras(path: str, model: VGG, variables: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write the weights of a network as Keras 3 saves those of keras.applications.

    Args:
      path: the file, whose name has to end in .weights.h5 when Keras reads it.
      model: the network.
      variables: its variables. Arrays are written in our layout, which is Keras'; bfloat16 as float32.
      metadata: what vgg_jax reads back beside the arrays.

    Raises:
      UserError: if h5py is missing, or keras.applications has no such network.
    """
    check_keras(model)
    h5py = require("h5py", "keras")
    with h5py.File(path, "w") as file:
        file.create_group("vars").attrs["name"] = f"vgg{model.depth}"
        for group, name, layer in keras_layers(model):
            arrays = file.create_group(f"layers/{group}/vars")
            arrays.attrs["name"] = name
            if layer is not None:
                for index, leaf in enumerate(("kernel", "bias")):
                    arrays[str(index)] = _plain(np.asarray(variables["params"][layer][leaf]))
        file[METADATA] = np.frombuffer(json.dumps(metadata).encode(), np.uint8)


def keras_layers(model: VGG) -> list[tuple[str, str, str | None]]:
    """Return Keras' group, Keras' name, and our layer with parameters or None, of each layer of keras.applications."""
    layers: list[tuple[str, str, str | None]] = [("input_layer", "input_layer", None)]
    counts = {"conv": 0, "pool": 0, "dense": 0}

    def add(kind: str, group: str, name: str, layer: str | None) -> None:
        number = f"_{counts[kind]}" if counts[kind] else ""
        counts[kind] += 1
        layers.append((group + number, name, layer))

    for layer in itertools.chain(*model.stages):
        if layer.kind == "conv":
            stage, index = layer.name.removeprefix("conv").split("_")
            add("conv", "conv2d", f"block{stage}_conv{index}", layer.name)
        elif layer.kind == "pool":
            add("pool", "max_pooling2d", f"block{layer.name.removeprefix('pool')}_pool", None)
    if model.head_layers:
        layers.append(("flatten", "flatten", None))
    for dense in model.head_layers:
        add("dense", "dense", DENSE[dense], dense)
    return layers


def _plain(array: np.ndarray) -> np.ndarray:
    """Return the array in a dtype that HDF5 has."""
    return array if array.dtype.kind == "f" else array.astype(np.float32)
