"""The reference VGG for JAX."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vgg_jax import features
    from vgg_jax.data.preprocessing import AUTHORS, CIFAR10, IMAGENET
    from vgg_jax.errors import UserError
    from vgg_jax.model import VGG
    from vgg_jax.network import Network, load
    from vgg_jax.weights.folding import fold_batch_norm
    from vgg_jax.weights.inference import optimize_for_inference
    from vgg_jax.weights.layouts import from_torch, to_torch

try:
    __version__ = importlib.metadata.version("vgg_jax")
except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"
__all__ = [
    "AUTHORS",
    "CIFAR10",
    "IMAGENET",
    "VGG",
    "Network",
    "UserError",
    "__version__",
    "features",
    "fold_batch_norm",
    "from_torch",
    "load",
    "optimize_for_inference",
    "to_torch",
]

# The module of each public name. It is imported when the name is first used, because a command sets environment
# variables that JAX reads when it is imported.
_MODULES = {
    **dict.fromkeys(("AUTHORS", "CIFAR10", "IMAGENET"), "vgg_jax.data.preprocessing"),
    **dict.fromkeys(("Network", "load"), "vgg_jax.network"),
    **dict.fromkeys(("from_torch", "to_torch"), "vgg_jax.weights.layouts"),
    "UserError": "vgg_jax.errors",
    "fold_batch_norm": "vgg_jax.weights.folding",
    "optimize_for_inference": "vgg_jax.weights.inference",
    "VGG": "vgg_jax.model",
}


def __getattr__(name: str) -> Any:
    """Return a public name, and import its module first."""
    if name == "features":
        return importlib.import_module("vgg_jax.features")
    if name not in _MODULES:
        raise AttributeError(f"module 'vgg_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
