"""The convolutional part of a network in a file of Keras: its column of Table 1, its pools, and what lies around it."""

import itertools
import re
from typing import Any, NamedTuple

from vgg_jax.errors import UserError
from vgg_jax.model import COLUMNS, VGG
from vgg_jax.weights.keras_files import KerasFile, KerasLayer

CONV_NAME = re.compile(r"(?:block(\d)_conv|conv(\d)_)(\d)(?:_\d+)*")  # of keras.applications and keras-vggface
# Layers that return their input when the network is not trained.
IDENTITIES = {
    *("input_layer", "dropout", "spatial_dropout2d", "gaussian_noise", "gaussian_dropout", "alpha_dropout"),
    *("activity_regularization",),
}
CHANGING = ("rescaling", "normalization", "lambda", "get_item", "resizing", "center_crop")  # of images


class Trunk(NamedTuple):
    """The convolutional part."""

    model: VGG  # with the right column and pools
    convs: list[KerasLayer]  # in order, each with a kernel and at most a bias
    after: list[KerasLayer]  # the layers of the head
    notes: tuple[str, ...]
    has_front: bool  # whether layers before the first convolution change the images
    input_size: tuple[int, int] | None  # height and width of the images, if the file states them
    map_size: tuple[int, int] | None  # height and width of the last map, likewise


def read_trunk(file: KerasFile) -> Trunk:
    """Find the convolutional part in the layers of a file.

    Raises:
      UserError: if it is not that of a column of Table 1, or its kernels have the layout of Theano.
    """
    convs = [layer for layer in file.layers if layer.arrays and layer.arrays[0].ndim == 4]
    if not convs:
        raise UserError(
            f"found layers {[layer.name for layer in file.layers][:5]}; expected Keras' VGG: block1_conv1, ..., fc1, "
            "fc2, predictions"
        )
    notes: list[str] = []
    if not file.has_config:
        matches = [CONV_NAME.fullmatch(conv.name) for conv in convs]
        if all(matches):
            numbers = [(int(m[1] or m[2]), int(m[3])) for m in matches if m]
            convs = [conv for _, conv in sorted(zip(numbers, convs, strict=True), key=lambda pair: pair[0])]
        else:
            notes.append("the convolutions have no names of a VGG and are taken in the file's order, by their shapes")
    _check_arrays(convs)
    model = _column(convs)
    if not file.has_config:
        return _without_config(file, model, convs, notes)
    first, last = (next(i for i, one in enumerate(file.layers) if one is conv) for conv in (convs[0], convs[-1]))
    input_size = _input_size(file.layers[: first + 1])
    front = [*file.front, *(describe(layer) for layer in file.layers[:first] if not is_identity(layer))]
    if front:
        notes.append(f"left out before {convs[0].name}: {', '.join(front)}; the preprocessing must do their work")
    end = last + 1
    while end < len(file.layers) and (is_identity(file.layers[end]) or file.layers[end].kind in _TRUNK_KINDS):
        end += 1
    model = _with_pools(model, file.layers[first:end])
    map_size = None
    if input_size:
        height, width = (side // 2 ** len(model.pool_after) for side in input_size)
        map_size = (height, width)
    return Trunk(model, convs, file.layers[end:], tuple(notes), bool(front), input_size, map_size)


_TRUNK_KINDS = ("max_pooling2d", "activation", "re_lu")


def is_identity(layer: KerasLayer) -> bool:
    """Return whether the layer returns its input when the network is not trained."""
    is_linear = layer.kind == "activation" and layer.settings.get("activation") == "linear"
    return layer.kind in IDENTITIES or layer.kind.startswith("random_") or is_linear


def describe(layer: KerasLayer) -> str:
    """Return a layer's name and, if the name does not contain it, its class; of a rescaling also its numbers."""
    if layer.kind == "rescaling":
        return f"{layer.name} (scale {layer.settings.get('scale')}, offset {layer.settings.get('offset')})"
    return layer.name if layer.name.startswith(layer.kind) else f"{layer.name} ({layer.kind})"


def activation_of(layer: KerasLayer) -> str:
    """Return the name of a layer's activation; "" if the layer is none that has one."""
    settings = layer.settings
    if layer.kind == "re_lu":
        plain = not settings.get("max_value") and not settings.get("negative_slope") and not settings.get("threshold")
        return "relu" if plain else "another ReLU"
    if layer.kind == "softmax":
        return "softmax" if settings.get("axis", -1) == -1 else "another softmax"
    if layer.kind not in ("activation", "dense", "conv2d", "convolution2d"):
        return ""
    activation = settings.get("activation") or "linear"
    return activation if isinstance(activation, str) else str(activation.get("class_name"))


def _check_arrays(convs: list[KerasLayer]) -> None:
    """Raise UserError if kernels have Theano's layout or biases do not fit."""
    shapes = [conv.arrays[0].shape for conv in convs]
    if all(shape[2:] == (3, 3) and shape[:2] != (3, 3) for shape in shapes):
        raise UserError(
            f"{convs[0].name} has a kernel of shape {shapes[0]}: the channels come first, as in files of Theano, which "
            "do not state whether the kernels are flipped; expected (3, 3, channels in, out): use the file whose name "
            "ends in tf_dim_ordering_tf_kernels.h5, or load this one with Keras 2 and save it again"
        )
    for conv in convs:
        kernel, *bias = conv.arrays
        if len(bias) > 1 or (bias and bias[0].shape != kernel.shape[-1:]):
            raise UserError(f"{conv.name} has arrays of shapes {[array.shape for array in conv.arrays]}; "
                            "expected a kernel and a bias")  # fmt: skip


def _column(convs: list[KerasLayer]) -> VGG:
    """Return the shallowest network whose convolutions, or the first of them, have the shapes of the file's."""
    found = [conv.arrays[0].shape for conv in convs]
    widths = [shape[3] for shape in found]
    linked = all(a[3] == b[2] for a, b in itertools.pairwise(found))
    for model in (*(VGG(depth) for depth in COLUMNS), VGG(16, conv1x1=True)):
        layers = [layer for stage in model.stages for layer in stage if layer.kind == "conv"]
        expected = [(layer.kernel_size, layer.kernel_size, layer.features) for layer in layers]
        actual = [(*shape[:2], shape[3]) for shape in found]
        if linked and actual == expected:
            return model
        if linked and actual == expected[: len(actual)]:
            final_layer = layers[len(actual) - 1].name.replace("conv", "relu")
            return model.clone(num_classes=None, hidden=(), final_layer=final_layer)
    raise UserError(
        f"its {len(convs)} convolutions have {', '.join(map(str, widths))} channels and begin with {convs[0].name}; "
        "expected those of VGG-11, 13, 16 or 19, such as 64, 64, 128, 128, 256, ..."
    )


def _without_config(file: KerasFile, model: VGG, convs: list[KerasLayer], notes: list[str]) -> Trunk:
    """Return the part of a file that holds weights only: its pools are assumed to be the paper's."""
    pools = sum(layer.kind == "max_pooling2d" for layer in file.layers)
    ends = _ends(model)
    before = sum(end < len(convs) for end in ends)  # the pools before the last convolution
    if model.final_layer and len(convs) in ends and pools == before + 1:
        model, before = model.clone(final_layer=f"pool{pools}"), pools
    expected = before if model.final_layer else 5
    if pools not in (0, expected):
        raise UserError(
            f"has {pools} max pools and does not state where; expected {expected}: save the whole model as .keras"
        )
    changing = [layer.name for layer in file.layers if layer.kind in CHANGING]
    if changing:
        notes.append(f"the network has the layers {', '.join(changing)}; the preprocessing must do their work")
    rest = [layer for layer in file.layers if layer.arrays and not any(layer is conv for conv in convs)]
    last = max(i for i, layer in enumerate(file.layers) if any(layer is conv for conv in convs))
    for layer in rest:
        inside = layer.container == convs[0].container and not file.is_ordered
        precedes = file.is_ordered and any(layer is one for one in file.layers[:last])
        if layer.arrays[0].ndim != 2 and (inside or precedes):
            raise UserError(
                f"has the layer {describe(layer)} among its convolutions; expected a VGG of Keras, which has "
                "convolutions, max pools and dense layers only"
            )
    return Trunk(model, convs, rest, tuple(notes), bool(changing), None, None)


def _with_pools(model: VGG, layers: list[KerasLayer]) -> VGG:
    """Return the network with its max pools, after checking the settings of all layers."""
    ends = _ends(model)
    seen, pool_after, activation, padded = 0, list[int](), "relu", False
    for layer in layers:
        settings = layer.settings
        if layer.kind in ("conv2d", "convolution2d"):
            _expect(activation == "relu", layer, f"follows an activation {activation}; expected relu")
            _check_conv(layer, padded)
            activation, padded, seen = activation_of(layer), False, seen + 1
        elif layer.kind == "zero_padding2d":
            _expect(settings.get("padding") in (1, [1, 1], [[1, 1], [1, 1]]), layer, "pads by other than 1")
            padded = True
        elif layer.kind in ("activation", "re_lu") and not is_identity(layer):
            _expect(activation in ("linear", "relu"), layer, f"follows an activation {activation}")
            activation = activation_of(layer)
        elif layer.kind == "max_pooling2d":
            sizes = [list(settings.get(key) or [2, 2]) for key in ("pool_size", "strides")]
            padding = settings.get("padding", settings.get("border_mode", "valid"))
            _expect(sizes == [[2, 2], [2, 2]] and padding == "valid", layer, "is not the 2x2 pool of stride 2")
            _expect(seen in ends and ends.index(seen) + 1 not in pool_after, layer, "does not end a stage")
            _expect(activation == "relu", layer, f"follows an activation {activation}; expected relu")
            pool_after.append(ends.index(seen) + 1)
        else:
            _expect(is_identity(layer), layer, "is among the convolutions; VGG has no such layer")
    _expect(activation == "relu", layers[-1], f"follows an activation {activation}; expected relu")
    final_layer = model.final_layer
    if final_layer and seen in ends and ends.index(seen) + 1 in pool_after:
        final_layer = f"pool{pool_after[-1]}"
    return model.clone(pool_after=tuple(pool_after), final_layer=final_layer)


def _ends(model: VGG) -> list[int]:
    """Return the number of convolutions up to the end of each stage of the whole network."""
    stages = model.clone(final_layer=None).stages
    return list(itertools.accumulate(sum(layer.kind == "conv" for layer in stage) for stage in stages))


def _check_conv(layer: KerasLayer, padded: bool) -> None:
    settings = layer.settings
    size = layer.arrays[0].shape[0]
    padding = settings.get("padding", settings.get("border_mode", "valid"))
    ordering = settings.get("data_format", settings.get("dim_ordering")) or "channels_last"
    _expect(padding == ("valid" if padded else "same") or (size == 1 and not padded), layer, f"has padding {padding}")
    _expect(ordering in ("channels_last", "tf", "default"), layer, f"has channels in the order {ordering}; "
            "expected channels_last: load it with Keras, set channels_last, and save it again")  # fmt: skip
    for key in ("strides", "subsample", "dilation_rate"):
        _expect(settings.get(key) in (None, [1, 1], 1), layer, f"has {key} {settings.get(key)}; expected 1")
    _expect(settings.get("groups", 1) == 1, layer, f"has {settings.get('groups')} groups; expected 1")


def _expect(holds: bool, layer: KerasLayer, problem: str) -> None:
    if not holds:
        raise UserError(f"its layer {describe(layer)} {problem}; expected the layers of a VGG")


def _input_size(layers: list[KerasLayer]) -> tuple[int, int] | None:
    """Return the height and width of the images that the first convolution takes, if they are stated."""
    size: Any = None
    for layer in layers:
        shape = layer.settings.get("batch_shape") or layer.settings.get("batch_input_shape")
        if shape:
            size = shape[1:3] if len(shape) == 4 and all(isinstance(side, int) for side in shape[1:3]) else None
        elif layer is not layers[-1] and not is_identity(layer) and layer.kind not in ("rescaling", "normalization"):
            size = None
    return (size[0], size[1]) if size else None
