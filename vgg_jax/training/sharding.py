"""The layout of a run on its devices: a sharded batch, and a head that is replicated or sharded.

The dense layers of the head hold 89 % of a VGG's parameters and do less than 1 % of its work. So it is cheaper to
exchange their activations between devices than their gradients (A. Krizhevsky, "One weird trick for parallelizing
convolutional neural networks", arXiv:1404.5997). With a sharded head, each of n devices holds 1/n of the rows of their
kernels, which belong to 1/n of the input channels, and the optimizer state of these rows. The input of such a layer is
resharded from examples to channels, and its output is a sum over the devices.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vgg_jax.model import VGG

AXIS = "data"


def make_mesh() -> Mesh:
    """Return a mesh of all devices of all processes, with the one axis `data`."""
    return Mesh(np.array(jax.devices()), (AXIS,))


def state_shardings(state: Any, mesh: Mesh, shard_head: bool = False) -> Any:
    """Return the sharding of each array of a training state: replicated, except for a sharded head.

    Args:
      state: a `TrainState` of arrays or of `jax.ShapeDtypeStruct`.
      mesh: the devices.
      shard_head: shard the rows of the kernels of dense layers, and of their optimizer state.

    Returns:
      A tree as `state`, of `NamedSharding`.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        *_, layer, array = (None, *(getattr(entry, "key", None) for entry in path))
        is_sharded = shard_head and layer in state.head_layers and array == "kernel"
        return NamedSharding(mesh, P(*(None,) * (leaf.ndim - 2), AXIS, None) if is_sharded else P())

    return jax.tree.map_with_path(sharding, state)


def with_sharding(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of an array together with its sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def with_sharded_head(model: VGG, mesh: Mesh) -> VGG:
    """Return the network with inputs of its dense layers sharded like the rows of their kernels."""
    return model.clone(head_sharding=NamedSharding(mesh, P(None, AXIS)))


def replicate(key: jax.Array, mesh: Mesh) -> jax.Array:
    """Return the key on all devices of the mesh. A key on one device would be copied to the others in every step."""
    sharding = NamedSharding(mesh, P())
    if jax.process_count() == 1:
        replicated: jax.Array = jax.device_put(key, sharding)
    else:  # device_put refuses the devices of other processes
        replicated = jax.jit(lambda key: key, out_shardings=sharding)(key)
    return replicated
