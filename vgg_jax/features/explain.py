"""Explanations of a prediction: which pixels, or which places of a map, speak for a class.

All functions are pure functions of arrays and can be used inside `jit`. They compute in evaluation mode, so each image
of a batch is explained by itself. Their values are those of Captum's LayerGradCam, GuidedBackprop, IntegratedGradients
(Gauss-Legendre) and Occlusion.

What is explained is a logit, before softmax or sigmoid. With `output`, it is a channel of another layer, summed over
the positions of its map; the labels are then channels.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vgg_jax.errors import UserError
from vgg_jax.features.activations import layer_activations
from vgg_jax.model import VGG

Images: TypeAlias = Float[Array | np.ndarray, "n h w c"]
Labels: TypeAlias = int | np.integer | Int[Array | np.ndarray, "*n"]
Baseline: TypeAlias = float | Float[Array | np.ndarray, "..."]


def grad_cam(
    model: VGG,
    variables: Mapping[str, Any],
    images: Images,
    labels: Labels,
    layer: str | None = None,
    *,
    positive: bool = True,
    output: str | None = None,
) -> Float[Array, "n map_h map_w"]:
    """Return Grad-CAM's map: the activations of a layer, weighted by the mean gradient of each channel.

    Args:
      model: the network.
      variables: its variables.
      images: (N, H, W, C) floats, normalized by the preprocessing of the weights.
      labels: one class, or (N,) classes: integers, whose range is not checked inside `jit`.
      layer: the layer whose map is weighted; by default the last ReLU of the convolutional part.
      positive: replace negative values by zero, as the source does.
      output: the layer whose channels `labels` are; by default the last, whose channels are classes.

    Returns:
      (N, H', W') in at least float32, with the height and width of the layer's map.

    Raises:
      UserError: if a layer is unknown, has no map or follows `output`, if `output` is None and the network has no
        classes, or if the labels have a wrong shape or are no channels of the output.

    Source:
      Selvaraju et al. (2017), "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization".
    """
    output, labels = _checked(model, images, labels, output)
    layer = last_map(model) if layer is None else layer
    names = model.layer_names
    if layer in names and names.index(layer) > names.index(output):
        raise UserError(f"layer is {layer}, which follows {output}; expected a layer before the output")
    shape = jax.eval_shape(lambda: layer_activations(model, variables, images, layer)[layer])
    if len(shape.shape) != 4:
        raise UserError(f"{layer} has no map; expected a layer of the convolutional part, such as {last_map(model)}")

    def score(addend: jax.Array) -> tuple[jax.Array, jax.Array]:
        perturbed = {**variables, "perturbations": {layer: addend}}
        y, state = model.apply(perturbed, images, last_layer=output, mutable=["intermediates"])
        return _channels(y, labels).sum(), state["intermediates"]["outputs"][layer]

    gradient, maps = jax.grad(score, has_aux=True)(jnp.zeros(shape.shape, shape.dtype))
    dtype = jnp.promote_types(shape.dtype, jnp.float32)
    weights = gradient.astype(dtype).mean((1, 2))
    found = jnp.einsum("nhwc,nc->nhw", maps.astype(dtype), weights, precision="highest")
    return jnp.maximum(found, 0) if positive else found


def guided_backpropagation(
    model: VGG, variables: Mapping[str, Any], images: Images, labels: Labels, *, output: str | None = None
) -> Float[Array, "n h w c"]:
    """Return the gradient of a class by the pixels, with negative gradients set to zero at every ReLU.

    It shows the edges and textures that the network responds to. It depends little on the class.

    Args:
      model: the network.
      variables: its variables.
      images: (N, H, W, C) floats, normalized by the preprocessing of the weights.
      labels: one class, or (N,) classes: integers, whose range is not checked inside `jit`.
      output: the layer whose channels `labels` are; by default the last, whose channels are classes.

    Returns:
      (N, H, W, C) in the dtype of the images.

    Raises:
      UserError: if the output is unknown, or None in a network without classes, or if the labels have a wrong shape or
        are no channels of it.

    Source:
      Springenberg et al. (2015), "Striving for Simplicity: The All Convolutional Net".
    """
    output, labels = _checked(model, images, labels, output)
    guided = model.clone(layers=dataclasses.replace(model.layers, relu=_guided_relu))
    gradient: jax.Array = jax.grad(lambda x: _scores(guided, variables, x, labels, output).sum())(jnp.asarray(images))
    return gradient


def integrated_gradients(
    model: VGG,
    variables: Mapping[str, Any],
    images: Images,
    labels: Labels,
    *,
    baseline: Baseline = 0.0,
    steps: int = 50,
    batch_size: int = 32,
    output: str | None = None,
) -> Float[Array, "n h w c"]:
    """Return how much each pixel adds to a class's logit, in comparison with a baseline.

    The sum over an image is the logit of the image minus that of the baseline, up to the error of the integral.

    Args:
      model: the network.
      variables: its variables.
      images: (N, H, W, C) floats, normalized by the preprocessing of the weights.
      labels: one class, or (N,) classes: integers, whose range is not checked inside `jit`.
      baseline: a number or an array that can be broadcast to the images. 0 is the mean color of the preprocessing.
      steps: points of the Gauss-Legendre quadrature on the straight line from the baseline to the image.
      batch_size: the most images that are computed together; if N is larger, N are.
      output: the layer whose channels `labels` are; by default the last, whose channels are classes.

    Returns:
      (N, H, W, C) in at least float32.

    Raises:
      UserError: if the output is unknown, or None in a network without classes, if the labels have a wrong shape or
        are no channels of it, or if `steps` or `batch_size` is less than 1.

    Source:
      Sundararajan et al. (2017), "Axiomatic Attribution for Deep Networks".
    """
    output, labels = _checked(model, images, labels, output, steps=steps, batch_size=batch_size)
    images = _wide(images)
    difference = images - jnp.asarray(baseline, images.dtype)
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    parts = [jnp.asarray(_chunks(x / 2, len(images), batch_size), images.dtype) for x in (1 - nodes, weights)]

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        distances, weights = part  # (K,); the distances are from the image
        points = images - distances[:, None, None, None, None] * difference
        gradients = jax.grad(lambda x: _scores(model, variables, x, labels, output).sum())(points)
        return total + jnp.tensordot(weights, gradients, 1, precision="highest"), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(images), (parts[0], parts[1]))
    return difference * total


def occlusion(
    model: VGG,
    variables: Mapping[str, Any],
    images: Images,
    labels: Labels,
    window: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    *,
    baseline: Baseline = 0.0,
    batch_size: int = 32,
    output: str | None = None,
) -> Float[Array, "n h w"]:
    """Return how much a class's logit falls if a window around each pixel is covered.

    The value of a pixel is the mean over all windows that cover it. Windows at the right and lower edge may be cut.

    Args:
      model: the network.
      variables: its variables.
      images: (N, H, W, C) floats, normalized by the preprocessing of the weights.
      labels: one class, or (N,) classes: integers, whose range is not checked inside `jit`.
      window: height and width of the window in pixels, or one number for both.
      stride: pixels from one window to the next, by default half of the window, rounded up.
      baseline: what covers the window: a number or an array that can be broadcast to the images. 0 is the mean color
        of the preprocessing.
      batch_size: the most images that are computed together; if N is larger, N are.
      output: the layer whose channels `labels` are; by default the last, whose channels are classes.

    Returns:
      (N, H, W) in at least float32.

    Raises:
      UserError: if the output is unknown, or None in a network without classes, if the labels have a wrong shape or
        are no channels of it, if the window does not fit into the images, if the stride is larger than the window, or
        if the stride or `batch_size` is less than 1.

    Source:
      Zeiler and Fergus (2014), "Visualizing and Understanding Convolutional Networks", section 4.2.
    """
    output, labels = _checked(model, images, labels, output, batch_size=batch_size)
    images = _wide(images)
    cover, (height, width) = jnp.asarray(baseline, images.dtype), images.shape[1:3]
    windows = _pair(window)
    strides = tuple(-(-side // 2) for side in windows) if stride is None else _pair(stride)
    rows, columns = (_covered(side, *sizes) for side, *sizes in zip((height, width), windows, strides, strict=True))
    places = np.indices((len(rows), len(columns))).reshape(2, -1)
    chunks = tuple(_chunks(place, len(images), batch_size) for place in places)
    original = _scores(model, variables, images, labels, output)

    def fall(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        down, across = jnp.asarray(rows)[chunk[0]], jnp.asarray(columns)[chunk[1]]
        covered = (down[:, :, None] & across[:, None, :])[:, None, :, :, None]
        return original - _scores(model, variables, jnp.where(covered, cover, images), labels, output)

    falls = jax.lax.map(fall, chunks).reshape(-1, len(images))[: places.shape[1]]
    falls = falls.reshape(len(rows), len(columns), len(images))
    down, across = (jnp.asarray(axis, falls.dtype) for axis in (rows, columns))
    total = jnp.einsum("rcn,rh,cw->nhw", falls, down, across, precision="highest")
    return total / (down.sum(0)[:, None] * across.sum(0))


def last_map(model: VGG) -> str:
    """Return the name of the last ReLU of the convolutional part of `model`, or of its last convolution without one."""
    layers = [layer for stage in model.stages for layer in stage]
    found = [layer.name for layer in layers if layer.kind == "relu"] or [layers[0].name]
    return found[-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _guided_relu(x: jax.Array, after_norm: bool) -> jax.Array:
    return jax.nn.relu(x)


def _guided_forward(x: jax.Array, after_norm: bool) -> tuple[jax.Array, jax.Array]:
    return _guided_relu(x, after_norm), x > 0


def _guided_backward(after_norm: bool, passed: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(passed & (gradient > 0), gradient, 0),)


_guided_relu.defvjp(_guided_forward, _guided_backward)


def _scores(model: VGG, variables: Any, images: jax.Array, labels: jax.Array, output: str) -> jax.Array:
    """Return the explained numbers (..., N) of images (..., N, H, W, C), in at least float32."""
    y: Any = model.apply(variables, images.reshape(-1, *images.shape[-3:]), last_layer=output)
    lead = images.shape[:-3]
    return _channels(y, jnp.broadcast_to(labels, lead).reshape(-1)).reshape(lead)


def _channels(y: jax.Array, labels: jax.Array) -> jax.Array:
    """Return one channel of each output (N, ..., C), summed over its positions: (N,)."""
    totals = y.reshape(len(y), -1, y.shape[-1]).sum(1)
    return jnp.take_along_axis(totals, labels[:, None], 1)[:, 0]


def _checked(model: VGG, images: Images, labels: Labels, output: str | None, **counts: int) -> tuple[str, jax.Array]:
    """Return the name of the explained layer and a label for each image."""
    geometry = model.layer_geometry
    if output is None and model.num_classes is None:
        raise UserError("the network has no classes; expected output, the layer whose channels to explain")
    output = model.layer_names[-1] if output is None else output
    if output not in geometry:
        raise UserError(f"found no layer {output}; expected one of {', '.join(geometry)}")
    if small := [f"{name} is {count}" for name, count in counts.items() if count < 1]:
        raise UserError(f"{', '.join(small)}; expected 1 or more")
    if jnp.shape(labels) not in ((), images.shape[:1]):
        raise UserError(f"labels have shape {jnp.shape(labels)}; expected one label, or {images.shape[:1]}")
    channels = geometry[output].channels
    if not isinstance(labels, jax.core.Tracer) and (wrong := [i for i in np.ravel(labels) if not 0 <= i < channels]):
        raise UserError(f"found the label {wrong[0]}; expected 0 to {channels - 1}, the channels of {output}")
    return output, jnp.broadcast_to(jnp.asarray(labels), images.shape[:1])


def _wide(images: Images) -> jax.Array:
    return jnp.asarray(images, jnp.promote_types(images.dtype, jnp.float32))


def _pair(sizes: int | tuple[int, int]) -> tuple[int, int]:
    return (sizes, sizes) if isinstance(sizes, int) else sizes


def _chunks(values: np.ndarray, images: int, batch_size: int) -> np.ndarray:
    """Return values (P,) in rows of which each is computed together, padded by zeros."""
    most = min(max(1, batch_size // max(1, images)), len(values))
    count = -(-len(values) // most)
    size = -(-len(values) // count)
    return np.pad(values, (0, count * size - len(values))).reshape(count, size)


def _covered(side: int, window: int, stride: int) -> np.ndarray:
    """Return for each position of a window the pixels that it covers along one axis, (positions, side) bools."""
    if not 0 < window <= side:
        raise UserError(f"the window has {window} pixels; expected 1 to {side}, the side of the images")
    if not 0 < stride <= window:
        raise UserError(f"the stride is {stride}; expected 1 to {window}, the window, so that every pixel is covered")
    first = np.arange(-(-(side - window) // stride) + 1)[:, None] * stride
    pixels = np.arange(side)
    return (first <= pixels) & (pixels < first + window)
