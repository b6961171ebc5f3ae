"""Networks optimized for inference on a CPU: the same function, with kernels in the form that the products read."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax.errors import UserError
from vgg_jax.model import FAST, PLAIN, VGG
from vgg_jax.ops.inference_layers import INFERENCE, choose_method, kernel_form, kernel_shape
from vgg_jax.weights.folding import batch_norm_epsilon, folded_arrays, folded_model


def optimize_for_inference(
    model: VGG, variables: Mapping[str, Any], image_shape: Sequence[int]
) -> tuple[VGG, dict[str, Any]]:
    """Prepare a network for inference on a CPU in float32; the result refuses training.

    Batch norm is folded into the convolutions. The kernel of each 3x3 convolution is replaced by the form that is
    fastest for its map: transformed by Winograd's algorithm once instead of in every call, or reshaped for one matrix
    product. The head's arrays are those of `variables`.

    The result computes images of any shape. For images of other shapes than `image_shape` another form of some kernels
    may be faster. If the variables change, call this function again.

    Args:
      model: the network, with the layers FAST or PLAIN.
      variables: its variables: `params`, and `batch_stats` with batch norm. Those of deeper layers may be missing. With
        jax.ShapeDtypeStruct in place of arrays, the result has such too.
      image_shape: the shape (N, H, W, C) of the batches of images.

    Returns:
      (model, variables): the network with `batch_norm=False`, `remat=False` and `param_dtype=float32`, and its
      `params`. The folded and transformed arrays are float32. The other arrays are those of `variables`.

    Raises:
      UserError: if the network does not compute in float32, has layers or a sharding of its own or variables that are
        not on a CPU, or the shape is not one of images.

    Source:
      Lavin and Gray (2016), "Fast Algorithms for Convolutional Neural Networks", for the transformed kernels.
    """
    _check(model, variables, image_shape)
    if model.layers == INFERENCE:
        return model, dict(variables)
    methods = choose_methods(model, variables, image_shape)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = threads.map(lambda name: _converted(model, variables, name, methods[name]), methods)
        convolutions = dict(zip(methods, found, strict=True))
    params = {
        name: convolutions.get(name, leaves)
        for name, leaves in variables["params"].items()
        if not name.startswith("bn")
    }
    optimized = folded_model(model).clone(layers=INFERENCE, param_dtype=jnp.float32, remat=False)
    return optimized, {"params": params}


def can_optimize(model: VGG) -> bool:
    """Return whether `optimize_for_inference` takes a network, and its layers are the default ones."""
    is_float32 = jnp.dtype(model.dtype) == jnp.float32
    return is_float32 and model.layers == FAST and model.head_sharding is None


def choose_methods(model: VGG, variables: Mapping[str, Any], image_shape: Sequence[int]) -> dict[str, str]:
    """Return the method of each convolution for images (N, H, W, C), by its name; "" for a 1x1 convolution."""
    count, height, width, _ = image_shape
    geometry, methods = model.layer_geometry, {}
    for name, leaves in variables["params"].items():
        if name.startswith("conv"):
            size, _, channels, features = leaves["kernel"].shape
            stride = geometry[name].stride
            shape = (count, height // stride, width // stride, channels)
            methods[name] = choose_method(shape, features) if size == 3 else ""
    return methods


def _check(model: VGG, variables: Mapping[str, Any], image_shape: Sequence[int]) -> None:
    dtype = jnp.dtype(model.dtype)
    if dtype != jnp.float32:
        raise UserError(f"the network computes in {dtype.name}; expected float32: pass model.clone(dtype=jnp.float32)")
    if model.layers not in (FAST, PLAIN, INFERENCE) or model.head_sharding is not None:
        raise UserError(
            "the network has layers or a sharding of its own; expected the default layers: pass "
            "model.clone(layers=vgg_jax.model.FAST, head_sharding=None)"
        )
    if len(image_shape) != 4 or min(image_shape) < 1 or min(image_shape[1:3]) < model.smallest_image():
        smallest = model.smallest_image()
        raise UserError(
            f"image_shape is {tuple(image_shape)}; expected (N, H, W, C) with H and W at least {smallest}: pass the "
            "shape of a batch of images"
        )
    arrays = [leaf for leaf in jax.tree.leaves(variables) if isinstance(leaf, jax.Array)]
    platforms = {device.platform for array in arrays for device in array.devices()}
    if platforms - {"cpu"}:
        raise UserError(
            f"the variables are on {', '.join(sorted(platforms))}; expected a CPU: use the network as it is, because "
            "its kernels are transformed on a CPU only"
        )


def _converted(model: VGG, variables: Mapping[str, Any], name: str, method: str) -> Mapping[str, Any]:
    """Return the kernel and the bias of a convolution with its batch norm, the kernel in the form of a method."""
    leaves = variables["params"][name]
    kernel, bias = leaves["kernel"], leaves["bias"]
    if isinstance(kernel, jax.ShapeDtypeStruct):
        shape = kernel_shape(kernel.shape, method) if method else kernel.shape
        return {
            "kernel": jax.ShapeDtypeStruct(shape, jnp.float32),
            "bias": jax.ShapeDtypeStruct(bias.shape, jnp.float32),
        }
    if model.batch_norm:
        norm = name.replace("conv", "bn")
        statistics = variables["batch_stats"][norm]
        kernel, bias = folded_arrays(leaves, variables["params"][norm], statistics, batch_norm_epsilon(model))
    elif method in ("", "direct"):
        return dict(leaves)
    device = next(iter(leaves["kernel"].devices())) if isinstance(leaves["kernel"], jax.Array) else None
    # Copies, because JAX may use the memory of an array of NumPy.
    kernel, bias = np.array(kernel), np.array(bias, np.float32)
    arrays = {"kernel": kernel_form(kernel, method) if method else kernel.astype(np.float32), "bias": bias}
    placed: dict[str, Any] = jax.device_put(arrays, device)
    return placed
