"""How a run lies on its devices: each has its share of the batch, and on request of the fully connected layers.

Those layers hold 89 % of a VGG's parameters and do less than 1 % of its work: it is cheaper to move their activations
between the devices than their gradients. Source: A. Krizhevsky, "One weird trick for parallelizing convolutional neural
networks", arXiv:1404.5997. Each of n devices has n-th parts of the rows of their kernels, those of some input features,
and of the optimizer's state for these; so each layer's input changes from a share of the examples to a share of the
features, and its output is a sum over the devices.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vgg_jax.model import VGG

AXIS = "data"


def make_mesh() -> Mesh:
    """All devices, of all processes, in one row."""
    return Mesh(np.array(jax.devices()), (AXIS,))


def state_shardings(state: Any, mesh: Mesh, shard_head: bool = False) -> Any:
    """Where each array of a training state lies: whole on every device, the kernels of dense layers perhaps in parts.

    Args:
      state: a `TrainState` of arrays, or of their shapes.
      mesh: the devices.
      shard_head: divide the rows of the dense layers' kernels, and of what the optimizer keeps of them.

    Returns:
      A tree as `state`, of `NamedSharding`s.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        is_kernel = getattr(path[-1], "key", None) == "kernel" and leaf.ndim == 2
        return NamedSharding(mesh, P(AXIS, None) if shard_head and is_kernel else P())

    return jax.tree.map_with_path(sharding, state)


def with_sharding(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of an array, with the devices that it is to lie on."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def with_sharded_head(model: VGG, mesh: Mesh) -> VGG:
    """The same network, whose dense layers take their inputs as the rows of their kernels lie."""
    return model.clone(head_sharding=NamedSharding(mesh, P(None, AXIS)))
