"""The initialization of a run from another network: a run, a file, a folder, or a pretrained network."""

import os
from typing import Any

import numpy as np

from vgg_jax.config import Config
from vgg_jax.console import note
from vgg_jax.errors import UserError
from vgg_jax.export.folders import PREFIX, is_network_folder, read_folder
from vgg_jax.export.hub import load_from_hub
from vgg_jax.model import VGG
from vgg_jax.training.class_names import difference, output_names
from vgg_jax.training.run_weights import load_run
from vgg_jax.weights.download import NAMES, load_weights
from vgg_jax.weights.formats import Loaded


def source_variables(config: Config, model: VGG) -> dict[str, Any]:
    """Return the variables of the network that `config.init_from` names, for images in RGB order.

    Print a note for each assumption about the file, and for other classes or another normalization than those of
    `config.data`.

    Args:
      config: the configuration of the run to initialize.
      model: the network of that run.

    Raises:
      UserError: if the source cannot be read, all its features are to be taken and differ from those of the model,
        or convolutions are to be trained that contain their batch norm.
    """
    taken = model.layers_with_parameters(config.init_layers)
    loaded = _load_source(config.init_from, config.init_step, not set(taken) & set(model.head_layers))
    for line in loaded.notes:
        note(f"{config.init_from}: {line}")
    source, variables, preprocessing = loaded.model, loaded.variables, loaded.preprocessing
    if "features" in config.init_layers and source.stages != model.stages:
        differences = [
            f"{field} {getattr(source, field)}, expected {getattr(model, field)}"
            for field in ("depth", "batch_norm", "lrn", "conv1x1", "pool_after", "final_layer")
            if getattr(source, field) != getattr(model, field)
        ]
        raise UserError(
            f"the features of config.init_from, {config.init_from}, differ from those of config.model: "
            f"it has {'; '.join(differences)}; choose another source, or set config.model to match"
        )
    frozen = model.layers_with_parameters(config.freeze)
    trained = [name for name in taken if name.startswith("conv") and name not in frozen]
    if source.folded and trained:
        raise UserError(
            f"the batch norm of config.init_from, {config.init_from}, is folded into its convolutions, which cannot be "
            "trained so; expected a network before folding: choose that one, or add 'features' to config.freeze"
        )
    names = output_names(config.data.class_names, model.num_classes)
    if "fc8" in taken and loaded.classes and names and loaded.classes != names:
        note(f"the last layer of {config.init_from} is for other classes: {difference(loaded.classes, names)}")
    if preprocessing is None:
        note(f"{config.init_from} does not state its preprocessing; config.data should be that of its training")
        return dict(variables)
    mean, std = preprocessing.mean, preprocessing.std
    if preprocessing.channel_order == "BGR":
        kernel = variables["params"]["conv1_1"]["kernel"]
        conv1_1 = {**variables["params"]["conv1_1"], "kernel": kernel[:, :, ::-1]}
        variables = {**variables, "params": {**variables["params"], "conv1_1": conv1_1}}
        mean, std = mean[::-1], std[::-1]
    if not (np.allclose(mean, config.data.mean) and np.allclose(std, config.data.std)):
        note(
            f"{config.init_from} was trained with mean {mean} and std {std}; "
            f"config.data has mean {config.data.mean} and std {config.data.std}"
        )
    return dict(variables)


def _load_source(name_or_path: str, step: str, features_only: bool) -> Loaded:
    """Load a run by its directory, weights by their file, folder or repository, or a pretrained network by its name.

    Args:
      name_or_path: the source.
      step: the checkpoint of a run: latest, best or a number.
      features_only: leave out an unknown head, for which a file is refused otherwise.
    """
    is_folder = name_or_path not in NAMES and os.path.isdir(name_or_path)
    if is_folder and not is_network_folder(name_or_path):
        return load_run(name_or_path, step)
    if step != "latest":
        raise UserError(
            f"config.init_step is {step!r}, and config.init_from, {name_or_path}, is not the directory of a run; "
            "expected a run; remove config.init_step"
        )
    if name_or_path.startswith(PREFIX):
        return load_from_hub(name_or_path, features_only)
    return read_folder(name_or_path, features_only) if is_folder else load_weights(name_or_path, features_only)
