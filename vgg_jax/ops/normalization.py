"""The normalization layers of VGG: local response normalization, and batch norm with the rules of PyTorch."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vgg_jax.ops.batch_statistics import normalize, normalize_by_batch
from vgg_jax.ops.sizes import surely


def local_response_norm(
    x: Float[Array, "n h w c"], size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0
) -> Float[Array, "n h w c"]:
    """Return x / (k + alpha * s) ** beta; s is the sum of squares over `size` neighboring channels.

    The paper uses AlexNet's form and constants (Krizhevsky et al. 2012, section 3.3). `torch.nn.LocalResponseNorm`
    divides the sum by `size`, so its equivalent is `LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2)`.

    Args:
      x: feature maps (N, H, W, C).
      size: the number of channels in the sum; channels outside the map count as zeros.
      alpha: the factor of the sum.
      beta: the exponent.
      k: the constant added to the sum.

    Returns:
      (N, H, W, C).
    """
    channels = x.shape[-1]
    squares = jnp.pad(x * x, ((0, 0),) * 3 + ((size // 2, size - 1 - size // 2),))
    total = sum(squares[..., i : i + channels] for i in range(size))
    return x * (k + alpha * total) ** -beta


class BatchNorm(nn.Module):
    """Batch normalization over all axes but the last, with the defaults and the running statistics of PyTorch.

    It differs from `nn.BatchNorm` in two ways: the running variance averages the unbiased variances of the batches, as
    in PyTorch, and the variance does not cancel (see `ops.batch_statistics`). The statistics are at least float32,
    whatever `dtype` is. The parameters are `scale` and `bias`; the collection `batch_stats` has `mean` and `var`.
    """

    momentum: float = 0.9  # the weight of the old value, which PyTorch calls 1 - momentum
    epsilon: float = 1e-5
    groups: int = 1  # consecutive equal parts of the batch that have statistics of their own, as one for each device
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], use_running_average: bool) -> Float[Array, "n h w c"]:
        """Return normalized feature maps.

        Args:
          x: feature maps (N, H, W, C).
          use_running_average: normalize by the running statistics. If False, normalize by the statistics of `x` and
            update the running statistics. With several groups these average the statistics of the groups.

        Returns:
          (N, H, W, C) in `dtype`.

        Raises:
          ValueError: if `use_running_average` is False and the groups have one value per channel, whose variance is 0,
            or N is not a multiple of `groups`.
        """
        channels = x.shape[-1]
        statistics_dtype = jnp.promote_types(self.param_dtype, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (channels,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), statistics_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), statistics_dtype)

        maps = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if use_running_average:
            y = normalize(maps, running_mean.value, running_var.value, scale, bias, self.epsilon)
            return y.astype(self.dtype)
        groups = 1 if self.is_initializing() else self.groups
        if not surely(lambda: x.shape[0] % groups == 0):
            raise ValueError(f"batch norm has a batch of {x.shape[0]} in {groups} groups; expected a multiple of them")
        count = x.size // channels // groups
        if surely(lambda: count == 1) and not self.is_initializing():
            raise ValueError(f"batch norm has maps of shape {x.shape} in training; expected more than 1 value "
                             "per channel: use a larger batch or larger images")  # fmt: skip
        y, mean, var = normalize_by_batch(maps, scale, bias, running_mean.value, self.epsilon, groups)
        if not self.is_initializing():
            for running, new in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
                decayed = self.momentum * running.value + (1 - self.momentum) * new
                running.value = decayed.astype(statistics_dtype)
        return y.astype(self.dtype)
