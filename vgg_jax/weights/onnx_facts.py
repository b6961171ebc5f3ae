"""What an ONNX file states beside its layers: preprocessing, class names and what the outputs mean."""

from typing import NamedTuple

import numpy as np

from vgg_jax.data.preprocessing import IMAGENET, Preprocessing
from vgg_jax.errors import UserError
from vgg_jax.model import VGG
from vgg_jax.weights.imagenet_classes import imagenet_classes, is_imagenets
from vgg_jax.weights.metadata import Stated, from_json
from vgg_jax.weights.onnx_files import OnnxFile
from vgg_jax.weights.onnx_networks import OnnxNetwork
from vgg_jax.weights.onnx_walk import Misfit, Walk, per_channel

UINT8 = 2  # in ONNX's numbers of types
TORCHVISIONS = "classifier.6.weight"  # a name in torchvision's networks, which exporters keep
DECIMALS = 7  # of a mean, which float32 holds


class Facts(NamedTuple):
    """What a file states; the fields are those of `formats.Loaded`."""

    model: VGG
    preprocessing: Preprocessing | None
    classes: tuple[str, ...] | None
    outputs: str | None
    notes: tuple[str, ...]
    sides: range | None


def onnx_facts(file: OnnxFile, network: OnnxNetwork, features_only: bool) -> Facts:
    """Return what an ONNX file states beside its layers: by its metadata if vgg_jax has written it, else by its nodes.

    Args:
      file: the content of the file.
      network: the network that its graph is.
      features_only: leave out what belongs to the head.

    Raises:
      UserError: if the metadata are damaged, or the graph changes its input in a way that is no preprocessing.
    """
    model, notes = network.model, list(network.notes)
    seen = _of_pixels(network.walk, notes)
    stated = from_json(file.metadata, model.param_dtype)
    if stated is None:
        classes = None
        channels = next(iter(network.arrays.values())).shape[1]
        is_float = next(iter(file.inputs.values()))[0] != UINT8
        if TORCHVISIONS in file.tensors and is_float and is_imagenets(model, channels) and not model.conv_head:
            seen, classes = IMAGENET, None if features_only else imagenet_classes()
            notes.append("torchvision's layout with 1000 classes: taken for ImageNet's preprocessing and classes")
        return Facts(model, seen, classes, network.outputs, tuple(notes), network.sides)
    preprocessing, is_described = stated.preprocessing, _is_described(network, stated)
    if is_described:
        notes.clear()
    if seen is not None and not _agree(seen, preprocessing):
        preprocessing = seen
        notes.append(
            "the graph normalizes pixels otherwise than its metadata state: the graph's normalization is taken"
        )
    if is_described:
        return Facts(stated.model, preprocessing, stated.classes, stated.outputs, tuple(notes), stated.sides)
    if not features_only:
        notes.append("the network that vgg_jax described in the file is another one; read off the graph instead")
    classes = stated.classes if model.num_classes == stated.model.num_classes else None
    return Facts(model, preprocessing, classes, stated.outputs or network.outputs, tuple(notes), network.sides)


def _is_described(network: OnnxNetwork, stated: Stated) -> bool:
    """Return whether the metadata describe the network that the graph is."""
    model, ours = network.model, stated.model
    return (
        (model.stages, model.head) == (ours.stages, ours.head)
        and (model.final_layer is None) == (ours.final_layer is None)
        and model.conv_head == ours.conv_head
        and (ours.final_layer is not None or model.pool_size == ours.pool_size)
        and network.pool in (None, ours.head_pool)
    )


def _agree(seen: Preprocessing, stated: Preprocessing | None) -> bool:
    """Return whether the normalization of a graph is the one that is stated, up to rounding."""
    return (
        stated is not None
        and seen.channel_order == stated.channel_order
        and len(seen.mean) == len(stated.mean)
        and np.allclose((seen.mean, seen.std), (stated.mean, stated.std), atol=1e-6)
    )


def _of_pixels(walk: Walk, notes: list[str]) -> Preprocessing | None:
    """Return the preprocessing of a graph that normalizes uint8 pixels; None if it takes normalized images.

    Raises:
      Misfit: if the graph changes images of an unknown range, or in another way.
    """
    kind, _ = next(iter(walk.file.inputs.values()))
    if kind != UINT8:
        for node, _ in walk.front:
            walk.refuse(node, "it changes an input of floats, whose range is unknown; expected a convolution first")
        return None
    channels = next(layer for layer in walk.layers if layer.kind == "conv").arrays["kernel"].shape[1]
    factor, shift, order = np.ones(channels), np.zeros(channels), "L" if channels == 1 else "RGB"
    for node, letters in walk.front:
        place = letters.index("C")
        if node.kind == "Gather":
            if walk.values.integers(node.inputs[1]) != [2, 1, 0] or node.attributes.get("axis", 0) != place:
                walk.refuse(node, "expected the reversal of the channels")
            factor, shift, order = factor[::-1], shift[::-1], "BGR" if order == "RGB" else "RGB"
            continue
        arrays = [walk.values.array(name) for name in node.inputs]
        array = arrays[0] if arrays[1] is None else arrays[1]
        if array is None or (arrays[1] is None and node.kind == "Div"):
            walk.refuse(node, "expected the normalization of pixels")
        inner = Walk(walk.file, walk.values, walk.tensor, order=letters)
        vector = per_channel(inner, node, array, channels).astype(np.float64)
        if node.kind in ("Mul", "Div"):
            change = vector if node.kind == "Mul" else 1 / vector
            factor, shift = factor * change, shift * change
        elif node.kind == "Add":
            shift = shift + vector
        else:
            factor, shift = (factor, shift - vector) if arrays[1] is not None else (-factor, vector - shift)
    std = 1 / (255 * factor)
    mean = tuple(round(float(value), DECIMALS) for value in -shift * std)
    side = walk.input_side
    preprocessing = Preprocessing(side or 1, side or 1, mean, tuple(float(f"{value:.7g}") for value in std), order)
    try:
        preprocessing.check()
    except UserError as error:
        raise Misfit(f"its graph takes uint8 pixels and does not normalize them as a VGG: {error}") from None
    values = f"mean {mean} and std {preprocessing.std}"
    if side is None:
        notes.append(
            f"its graph normalizes pixels by {values}; its size is open: pass them with the resize and the crop"
        )
        return None
    notes.append(f"its graph normalizes pixels by {values}; images are resized to its {side} pixels")
    return preprocessing
