"""A network as a module of Flax's NNX, by Flax's own bridge."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from vgg_jax.model import VGG

VARIABLES = {"params": nnx.Param, "batch_stats": nnx.BatchStat}  # the bridge's type of each collection


def to_nnx(model: VGG, variables: Mapping[str, Any], rngs: nnx.Rngs | None = None) -> nnx.bridge.ToNNX:
    """Return an `nnx.Module` with the weights of a network: `module(images)` gives logits.

    `module(images, train=True, mutable=["batch_stats"])` is the function of training: dropout draws from `rngs`, and
    batch norm takes the statistics of the batch and updates the running ones in the module.

    Args:
      model: the network.
      variables: its variables, whose arrays the module shares.
      rngs: the random streams of dropout; by default `nnx.Rngs(dropout=0)`.

    Returns:
      The module. `module.conv1_1["kernel"]` is an `nnx.Param`, `module.bn1_1["mean"]` an `nnx.BatchStat`.
    """
    module = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(dropout=0) if rngs is None else rngs)
    layers: dict[str, dict[str, Any]] = {}
    for collection, variable in VARIABLES.items():
        for layer, leaves in variables.get(collection, {}).items():
            layers.setdefault(layer, {}).update({name: variable(array) for name, array in leaves.items()})
    for layer, leaves in layers.items():
        setattr(module, layer, nnx.data(leaves))
    return module


def from_nnx(module: nnx.bridge.ToNNX) -> dict[str, Any]:
    """Return the variables that a module of `to_nnx` holds, such as after training.

    Returns:
      `params`, and `batch_stats` with batch norm.
    """
    variables: dict[str, Any] = {}
    for collection, variable in VARIABLES.items():
        state = nnx.to_pure_dict(nnx.state(module, variable))
        if state:
            variables[collection] = state
    return variables
