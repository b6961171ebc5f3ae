"""Where a run starts from: the variables of another network, checked against the one to train."""

import numpy as np

from vgg_jax.config import Config
from vgg_jax.errors import UserError
from vgg_jax.model import VGG
from vgg_jax.pretrained import load_weights
from vgg_jax.reporting import say
from vgg_jax.weights import Variables


def source_variables(config: Config, model: VGG) -> Variables:
    """The variables of the network that `config.init_from` names, for images in the order RGB.

    Says so where that network saw its images normalised otherwise than `config.data` does.

    Raises:
      UserError: where the source cannot be read, or all its features are asked for and are not the model's.
    """
    source, variables, prepare = load_weights(config.init_from)
    if "features" in config.init_layers and source.stages != model.stages:
        differences = [
            f"{field} {getattr(source, field)}, expected {getattr(model, field)}"
            for field in ("depth", "batch_norm", "lrn", "conv1x1", "pool_after")
            if getattr(source, field) != getattr(model, field)
        ]
        raise UserError(
            f"the features of config.init_from, {config.init_from}, are not those of config.model: "
            f"it has {'; '.join(differences)}"
        )
    mean, std = prepare.mean, prepare.std
    if prepare.channel_order == "BGR":
        kernel = variables["params"]["conv1_1"]["kernel"]
        conv1_1 = {**variables["params"]["conv1_1"], "kernel": kernel[:, :, ::-1]}
        variables = {**variables, "params": {**variables["params"], "conv1_1": conv1_1}}
        mean, std = mean[::-1], std[::-1]
    if not (np.allclose(mean, config.data.mean) and np.allclose(std, config.data.std)):
        say(
            f"note: {config.init_from} wants mean {mean} and std {std}; "
            f"config.data has mean {config.data.mean} and std {config.data.std}"
        )
    return variables
