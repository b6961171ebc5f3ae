"""The implementations of a network's layers: fast ones, and those of Flax."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vgg_jax.ops.conv3x3 import Conv1x1, Conv3x3
from vgg_jax.ops.dense import Dense
from vgg_jax.ops.normalization import BatchNorm
from vgg_jax.ops.pooling import max_pool, plain_max_pool


@dataclasses.dataclass(frozen=True)
class Layers:
    """The implementations of a network's layers.

    `model.clone(layers=dataclasses.replace(FAST, norm=...))` replaces one of them. Use a class or function at the top
    level of a module, so that networks with equal fields are equal: `jax.jit` then does not trace again.

    Attributes:
      conv: called as
        conv(features, kernel_size, kernel_init=..., dtype=..., param_dtype=..., precision=..., name=...)(x).
      norm: called as norm(dtype=..., param_dtype=..., name=...)(x, use_running_average=...), with groups=... if
        `batch_norm_groups` is more than 1.
      pool: called as pool(x), the 2x2 max pool of stride 2.
      dense: called as dense(features, kernel_init=..., dtype=..., param_dtype=..., precision=..., name=...)(x).
      relu: called as relu(x, after_norm); after_norm is True in networks with batch norm.
    """

    conv: Callable[..., Callable[..., jax.Array]]
    norm: Callable[..., Callable[..., jax.Array]]
    pool: Callable[[jax.Array], jax.Array]
    dense: Callable[..., Callable[..., jax.Array]]
    relu: Callable[[jax.Array, bool], jax.Array]


def _fast_conv(features: int, kernel_size: tuple[int, int], **options: Any) -> Callable[..., jax.Array]:
    return (Conv3x3 if kernel_size == (3, 3) else Conv1x1)(features, **options)


def relu(x: jax.Array, after_norm: bool) -> jax.Array:
    """Return the ReLU; its derivative at 0 is 0.

    After a convolution the derivative depends on the output, as in PyTorch. So only the output is kept for the backward
    pass, and on a GPU the ReLU is a part of the convolution: a step of VGG-16, 256 images of 224x224 in bfloat16, takes
    47.5 instead of 50.0 ms and 8,250 instead of 11,870 MiB (H100). After batch norm that is slower, 65.6 instead of
    62.6 ms: there the derivative depends on the input, which XLA computes again.
    """
    y: jax.Array = nn.relu(x) if after_norm else _relu(x)
    return y


@jax.custom_jvp
def _relu(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0)


@_relu.defjvp
def _relu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    y = _relu(*primals)
    return y, jnp.where(y != 0, *tangents, 0)  # XLA would turn y > 0 into x > 0, and keep x


# FAST has the operations of vgg_jax.ops, which are faster on a CPU. PLAIN has those of Flax, which compile faster,
# except for batch norm and the ReLU. Both give the same results and derivatives up to rounding.
FAST = Layers(conv=_fast_conv, norm=BatchNorm, pool=max_pool, dense=Dense, relu=relu)
PLAIN = Layers(conv=nn.Conv, norm=BatchNorm, pool=plain_max_pool, dense=nn.Dense, relu=relu)
