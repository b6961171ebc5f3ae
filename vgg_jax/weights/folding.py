"""Batch norm folding: the same function in evaluation, with fewer layers."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from vgg_jax.model import VGG


def fold_batch_norm(model: VGG, variables: Mapping[str, Any]) -> tuple[VGG, dict[str, Any]]:
    """Fold the batch norm of a network into its convolutions, for evaluation.

    With the running statistics, batch norm is a scale and a shift of each channel, so a convolution can contain it. The
    result needs no batch norm and refuses training, which needs the statistics of the batch.

    Args:
      model: the network. One without batch norm is returned as it is.
      variables: its variables: `params` and `batch_stats`.

    Returns:
      (model, variables): the network with `batch_norm=False` and `folded=True`, and its `params`. The kernels and
      biases of the convolutions are at least float32; the arrays of the head are those of `variables`.
    """
    if not model.batch_norm:
        return model, dict(variables)
    dtype = jnp.promote_types(model.param_dtype, jnp.float32)
    params, epsilon = variables["params"], batch_norm_epsilon(model)
    folded = {}
    for name, leaves in params.items():
        if name.startswith("bn"):
            continue
        norm = name.replace("conv", "bn")
        if norm in params and norm != name:
            kernel, bias = folded_arrays(leaves, params[norm], variables["batch_stats"][norm], epsilon)
            folded[name] = {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.asarray(bias, dtype)}
        else:
            folded[name] = dict(leaves)
    return folded_model(model).clone(param_dtype=dtype), {"params": folded}


def folded_model(model: VGG) -> VGG:
    """Return the network whose convolutions contain its batch norm; one without batch norm is returned as it is."""
    if not model.batch_norm:
        return model
    final = model.final_layer
    return model.clone(batch_norm=False, folded=True, final_layer=final.replace("bn", "conv") if final else None)


def batch_norm_epsilon(model: VGG) -> float:
    """Return the constant that the batch norm of a network adds to the variance."""
    norm: Any = model.layers.norm()
    return float(norm.epsilon)


def folded_arrays(
    conv: Mapping[str, Any], norm: Mapping[str, Any], statistics: Mapping[str, Any], epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the kernel (..., C) and the bias (C,) of a convolution with its batch norm, in float64.

    Args:
      conv: kernel (..., C) and bias (C,).
      norm: scale (C,) and bias (C,).
      statistics: mean (C,) and var (C,).
      epsilon: the constant that batch norm adds to the variance.
    """
    kernel, bias, scale, shift, mean, var = (
        np.asarray(leaves[name], np.float64)
        for leaves, name in (
            (conv, "kernel"), (conv, "bias"), (norm, "scale"), (norm, "bias"), (statistics, "mean"), (statistics, "var")
        )
    )  # fmt: skip
    factor = scale / np.sqrt(var + epsilon)
    return kernel * factor, (bias - mean) * factor + shift
