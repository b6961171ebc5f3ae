"""The implementations of a network's layers: fast ones, and those of Flax."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

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
      relu: called as relu(x).
    """

    conv: Callable[..., Callable[..., jax.Array]]
    norm: Callable[..., Callable[..., jax.Array]]
    pool: Callable[[jax.Array], jax.Array]
    dense: Callable[..., Callable[..., jax.Array]]
    relu: Callable[[jax.Array], jax.Array]


def _fast_conv(features: int, kernel_size: tuple[int, int], **options: Any) -> Callable[..., jax.Array]:
    return (Conv3x3 if kernel_size == (3, 3) else Conv1x1)(features, **options)


def _relu(x: jax.Array) -> jax.Array:  # a function of this module, because nn.relu cannot be pickled
    y: jax.Array = nn.relu(x)
    return y


# FAST has the operations of vgg_jax.ops, which are faster on a CPU. PLAIN has those of Flax, which compile faster. Both
# give the same results and derivatives up to rounding.
FAST = Layers(conv=_fast_conv, norm=BatchNorm, pool=max_pool, dense=Dense, relu=_relu)
PLAIN = Layers(conv=nn.Conv, norm=BatchNorm, pool=plain_max_pool, dense=nn.Dense, relu=_relu)
