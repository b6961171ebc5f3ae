"""The `config.json` of timm: what it states of a network, and what it has no words for."""

import math
from collections.abc import Mapping
from typing import Any

from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.errors import UserError
from vgg_jax.model import COLUMNS, VGG
from vgg_jax.weights.formats import Loaded

WIDTH = 4096  # of timm's fc2; that of fc1 is a multiple, `mlp_ratio`
ARCHITECTURES = {f"vgg{depth}{suffix}": (depth, bool(suffix)) for depth in COLUMNS for suffix in ("", "_bn")}
# Images of this side give a last map that is larger than 7x7, for which timm's head differs from torchvision's.
FIRST_OTHER_SIDE = 256
# Arguments of timm's models that leave the function as it is, with the only value that does; None: any.
KNOWN_ARGUMENTS = {
    "in_chans": None,
    "num_classes": None,
    "mlp_ratio": None,
    "drop_rate": None,
    "global_pool": "avg",
    "output_stride": 32,
}


def inexpressible(network: Loaded) -> str | None:
    """Return what timm has no name for, or None if timm has a name for the whole network.

    Args:
      network: the network.

    Returns:
      The first property that timm's VGG or its `config.json` lacks, as the subject of a sentence.
    """
    model, preprocessing = network.model, network.preprocessing
    problems = [
        (model.lrn, "local response normalization"),
        (model.conv1x1, "column C of the paper"),
        (model.final_layer is not None, f"the end at {model.final_layer}"),
        (model.pool_after != VGG.pool_after, f"pool_after={model.pool_after}"),
        (len(model.hidden) != 2 or model.hidden[1] != WIDTH, f"the head with hidden={model.hidden}"),
        (model.pool_size != 7, f"pool_size={model.pool_size}"),
        (model.head_pool != "average", f"head_pool={model.head_pool!r}"),
        (preprocessing is None, "a network without a stated preprocessing"),
        (
            preprocessing is not None and not model.conv_head and preprocessing.crop >= FIRST_OTHER_SIDE,
            f"torchvision's head at {preprocessing.crop if preprocessing else 0} pixels",
        ),
    ]
    return next((problem for holds, problem in problems if holds), None)


def to_config(network: Loaded) -> dict[str, Any]:
    """Return the content of timm's `config.json` for a network that timm has a name for.

    Args:
      network: the network, with a preprocessing in the channel order RGB or L.
    """
    model, preprocessing = network.model, network.preprocessing
    assert preprocessing is not None
    kernels = network.variables["params"]
    channels, last = kernels["conv1_1"]["kernel"].shape[2], list(kernels[f"conv5_{_last_conv(model)}"]["bias"].shape)
    arguments: dict[str, Any] = {}
    if model.hidden[0] != WIDTH:
        arguments["mlp_ratio"] = model.hidden[0] / WIDTH
    if channels != 3:
        arguments["in_chans"] = channels
    if model.dropout_rate:
        arguments["drop_rate"] = model.dropout_rate
    side = preprocessing.crop
    config: dict[str, Any] = {
        "architecture": f"vgg{model.depth}{'_bn' if model.batch_norm else ''}",
        "num_classes": model.num_classes or 0,
        "num_features": last[0],
        "global_pool": "avg",
    }
    if network.classes is not None:
        config["label_names"] = list(network.classes)
    if arguments:
        config["model_args"] = arguments
    config["pretrained_cfg"] = {
        "custom_load": False,
        "input_size": [channels, side, side],
        "fixed_input_size": False,
        "interpolation": "bilinear",
        "crop_pct": crop_fraction(side, preprocessing.resize),
        "crop_mode": "center",
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "num_classes": model.num_classes or 0,
        "pool_size": [side // 32, side // 32],
        "first_conv": "features.0",
        "classifier": "head.fc",
    }
    return config


def crop_fraction(crop: int, resize: int) -> float:
    """Return timm's `crop_pct`: timm resizes the short side to floor(crop / crop_pct), which is then `resize`."""
    fraction = crop / resize
    while math.floor(crop / fraction) < resize:  # the quotient was rounded up
        fraction = math.nextafter(fraction, 0)
    return fraction


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the architecture that a `config.json` states; raise UserError if it is none of timm's VGGs."""
    found = config.get("architecture", config.get("architectures", config.get("model_type")))
    if not isinstance(found, str) or found not in ARCHITECTURES:
        raise UserError(
            f"config.json states the architecture {found!r}; expected one of timm's {', '.join(ARCHITECTURES)}, or a "
            "folder that vgg_jax wrote: choose a folder of a VGG"
        )
    return found


def with_config(loaded: Loaded, config: Mapping[str, Any]) -> Loaded:
    """Return the network of timm's weights with what timm's `config.json` states of it.

    Args:
      loaded: the network as its weights show it.
      config: the content of `config.json`.

    Returns:
      The network with timm's head. Notes name what vgg_jax has not, such as bicubic interpolation.

    Raises:
      UserError: if the configuration is of another network than the weights, or of a network that VGG is not.
    """
    architecture = architecture_of(config)
    stated = {**config, **config["pretrained_cfg"]} if "pretrained_cfg" in config else dict(config)
    stated |= {name: config[name] for name in ("num_classes", "label_names") if name in config}
    arguments = _arguments(config)
    model = loaded.model
    depth, batch_norm = ARCHITECTURES[architecture]
    if (model.depth, model.batch_norm) != (depth, batch_norm):
        found = f"vgg{model.depth}{'_bn' if model.batch_norm else ''}"
        raise UserError(
            f"config.json states the architecture {architecture}, and the weights are those of {found}; expected one "
            "network: use the config.json of the weights"
        )
    if "drop_rate" in arguments:
        model = model.clone(dropout_rate=float(arguments["drop_rate"]))
    preprocessing, notes = _preprocessing(stated)
    names = label_names(stated, model.num_classes)
    if names is None and (names := loaded.classes):
        notes.append("config.json has no label_names; 1000 classes: taken for ImageNet's")
    return loaded._replace(model=model, preprocessing=preprocessing, classes=names, notes=tuple(notes))


def label_names(config: Mapping[str, Any], num_classes: int | None) -> tuple[str, ...] | None:
    """Return the names of the classes by label; None if `config.json` states none.

    Raises:
      UserError: if they do not fit the number of classes.
    """
    stated = config.get("label_names", config.get("labels"))
    if not stated:
        return None
    if isinstance(stated, Mapping):
        by_label = {str(label): name for label, name in stated.items()}
        stated = [by_label.get(str(label)) for label in range(num_classes or 0)]
        stated = stated if len(by_label) == len(stated) else None
    if not isinstance(stated, list) or len(stated) != num_classes or not all(isinstance(name, str) for name in stated):
        raise UserError(
            f"config.json has label_names that do not fit the {num_classes or 'no'} classes of the weights; expected "
            "one name for each class: correct label_names"
        )
    return tuple(stated)


def _last_conv(model: VGG) -> int:
    """Return the number of convolutions in the last stage."""
    return sum(layer.kind == "conv" for layer in model.stages[-1])


def _arguments(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments of timm's model; raise UserError if they change it to one that VGG is not."""
    arguments = config.get("model_args") or {}
    for name, value in {"global_pool": config.get("global_pool", "avg"), **arguments}.items():
        if name not in KNOWN_ARGUMENTS or KNOWN_ARGUMENTS[name] not in (None, value):
            raise UserError(
                f"config.json states {name}={value!r}; expected timm's VGG without it, because VGG has nothing like "
                "it: choose another network"
            )
    return dict(arguments)


def _preprocessing(config: Mapping[str, Any]) -> tuple[Preprocessing | None, list[str]]:
    """Return the preprocessing that timm's configuration states, or None and the reason."""
    try:
        channels, height, width = config["input_size"]
        mode, filter_ = config.get("crop_mode", "center"), config.get("interpolation", "bicubic")
        resize = math.floor(height / config.get("crop_pct", 0.875))
        mean, std = (tuple(map(float, config[name])) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {error}"
        return None, [f"config.json does not state the preprocessing ({reason}); pass preprocessing"]
    unknown = [
        text
        for holds, text in (
            (filter_ == "bilinear", f"{filter_} interpolation"),
            (mode == "center", f"the crop mode {mode}"),
            (height == width, f"images of {height}x{width} pixels"),
            (channels in (1, 3), f"{channels} channels"),
        )
        if not holds
    ]
    if unknown:
        return None, [f"config.json states {', '.join(unknown)}, which vgg_jax has not; pass preprocessing"]
    preprocessing = Preprocessing(resize, height, mean, std, "L" if channels == 1 else "RGB")
    try:
        preprocessing.check()
    except UserError as error:
        raise UserError(f"config.json: {error}") from None
    return preprocessing, []
