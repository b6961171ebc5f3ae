"""Checks of a configuration against the model, the data and the devices."""

import dataclasses
from typing import Any

from vgg_jax.config import Config, ModelConfig, numbers_of, rates_of, type_problems
from vgg_jax.data.dataset import Split
from vgg_jax.data.labels import KINDS
from vgg_jax.errors import UserError
from vgg_jax.model import VGG
from vgg_jax.training.field_checks import value_problems


def check_data(config: Config, train_split: Split, eval_split: Split, num_devices: int) -> None:
    """Check the configuration against the data and the devices.

    Args:
      config: the configuration of a run.
      train_split: its training split.
      eval_split: its evaluation split.
      num_devices: the number of devices of all processes.

    Raises:
      UserError: with one line for each problem: found, expected, remedy.
    """
    problems = []
    for split in (train_split, eval_split):
        problems += _label_problems(config, split)
        if 0 < config.model.num_classes < split.num_classes:
            problems.append(
                f"config.model.num_classes is {config.model.num_classes}; "
                f"expected at least {split.num_classes}, the classes of {split.name}"
            )
        if split.channels != len(config.data.mean):
            problems.append(
                f"config.data.mean and std have {len(config.data.mean)} channels; "
                f"expected {split.channels}, the channels of {split.name}"
            )
    problems += _weight_problems(config, train_split)
    if len(train_split) < config.batch_size:
        problems.append(
            f"config.batch_size is {config.batch_size}; expected at most {len(train_split)}, "
            f"the examples of {train_split.name}"
        )
    multiple = num_devices * config.accumulation_steps
    if config.batch_size % multiple:
        below = config.batch_size // multiple * multiple
        valid = [size for size in (below, below + multiple) if size]
        parts = f" and {config.accumulation_steps} micro-batches" if config.accumulation_steps > 1 else ""
        problems.append(
            f"config.batch_size is {config.batch_size}; expected a multiple of {multiple}, for {num_devices} "
            f"devices{parts}; use {' or '.join(map(str, valid))}"
        )
    widths = (512 * config.model.pool_size**2, *config.model.hidden)
    if config.shard_head and any(width % num_devices for width in widths):
        problems.append(
            f"config.shard_head divides the inputs of the dense layers, {', '.join(map(str, widths))}, among "
            f"{num_devices} devices; expected multiples of {num_devices}; set config.shard_head=False"
        )
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def _label_problems(config: Config, split: Split) -> list[str]:
    """Return one line if the loss or the number of outputs does not fit the labels of a split."""
    outputs, loss = config.model.num_classes, config.loss
    if loss == "softmax" and split.label_shape:
        expected = "sigmoid, or squared_error for a regression"
    elif loss == "squared_error" and not split.label_shape:
        expected = "softmax or sigmoid"
    elif outputs == split.num_classes == 1 and not split.label_shape:
        return [f"{split.name} has one class; expected two or more: add the images of another class"]
    elif split.label_shape and outputs > split.num_classes:
        return [f"config.model.num_classes is {outputs}; expected {split.num_classes}, the labels of {split.name}"]
    else:
        return []
    return [
        f"config.loss is {loss!r}, and the labels of {split.name} are {KINDS[split.label_kind]}; expected {expected}"
    ]


def _weight_problems(config: Config, split: Split) -> list[str]:
    """Return one line if class weights or balanced sampling do not fit the training split."""
    outputs, weights = max(config.model.num_classes, split.num_classes), config.class_weights
    if split.label_shape and (config.data.balanced or weights == "balanced"):
        field = "data.balanced is True" if config.data.balanced else "class_weights is 'balanced'"
        return [f"config.{field}, and the labels of {split.name} are {KINDS[split.label_kind]}; expected one class"]
    if weights not in ("", "balanced") and len(numbers_of(weights) or ()) != outputs:
        return [f"config.class_weights is {weights!r}; expected {outputs} numbers, one for each class of {split.name}"]
    return []


def create_model(config: ModelConfig, devices: int = 1) -> VGG:
    """Return the network of a configuration.

    Args:
      config: the fields of the network.
      devices: number of devices of the run, each of which may have batch norm statistics of its own.

    Raises:
      UserError: if the dtype is still `auto`, which `run_directory.resolve_dtype` replaces, or the number of classes is
        still 0, which `class_names.resolve_classes` replaces.
    """
    if config.num_classes == 0:
        raise UserError("num_classes is 0; expected the number of classes of the data; call resolve_classes first")
    if config.dtype == "auto":
        raise UserError("dtype is 'auto'; expected float32, bfloat16 or float64; call resolve_dtype first")
    param_dtype = "float64" if config.dtype == "float64" else "float32"
    fields = dataclasses.asdict(config)
    groups = devices if fields.pop("batch_norm_statistics") == "device" else 1
    return VGG(**fields, batch_norm_groups=groups, param_dtype=param_dtype)


def check_config(config: Config) -> None:
    """Check everything in a configuration that does not depend on data or devices.

    Raises:
      UserError: with one line for each problem: found, expected.
    """
    if problems := type_problems(config) or [*value_problems(config), *_model_problems(config)]:
        raise UserError("\n".join(problems))


def _model_problems(config: Config) -> list[str]:
    problems: list[str] = []
    data = config.data
    try:
        # No check depends on the dtype, the precision or the number of classes, which are checked elsewhere.
        fields: dict[str, Any] = dict(dtype="float32", precision="highest", num_classes=config.model.num_classes or 1)
        model = create_model(dataclasses.replace(config.model, **fields))
    except ValueError as error:
        problems.append(f"config.model.{error}")
    else:
        for field in ("init_layers", "freeze"):
            try:
                layers = model.layers_with_parameters(getattr(config, field))
            except ValueError as error:
                problems.append(f"config.{field}: {error}")
            else:
                if field == "freeze" and layers == model.layers_with_parameters(("features", "head")):
                    problems.append("config.freeze has all layers; expected at least one that trains")
        if config.init_from and not problems:
            taken, frozen = (model.layers_with_parameters(names) for names in (config.init_layers, config.freeze))
            if not taken:
                problems.append("config.init_layers is (); expected the layers to take from config.init_from")
            if strangers := [layer for layer in frozen if layer not in taken]:
                problems.append(f"config.freeze has {', '.join(strangers)}; expected layers of config.init_layers")
        problems += [*_rate_problems(config, model), *_cache_problems(config, model)] if not problems else []
        smallest = model.smallest_image()
        if data.image_size < smallest:
            problems.append(
                f"config.data.image_size is {data.image_size}; expected at least {smallest}, "
                "for the max pools of config.model.pool_after"
            )
        elif not problems:
            problems += _batch_norm_problems(config, model)
    return problems


def _rate_problems(config: Config, model: VGG) -> list[str]:
    """Return a line for each name in `config.optimizer.rates` that is no layer or has only frozen layers."""
    problems, frozen = [], model.layers_with_parameters(config.freeze)
    for name in rates_of(config.optimizer.rates) or {}:
        try:
            layers = model.layers_with_parameters((name,))
        except ValueError as error:
            problems.append(f"config.optimizer.rates: {error}")
        else:
            if set(layers) <= set(frozen):
                problems.append(
                    f"config.optimizer.rates has {name}, which is frozen; remove it here or in config.freeze"
                )
    return problems


def _cache_problems(config: Config, model: VGG) -> list[str]:
    """Return a line if no output of a layer can be cached, because the first layer trains."""
    first = model.layers_with_parameters(("features",))[0]
    if not config.cache_features or first in model.layers_with_parameters(config.freeze):
        return []
    return [
        f"config.cache_features is True, and the first layer, {first}, trains; expected frozen first layers: set "
        "config.freeze=('features',), or config.cache_features=False"
    ]


def _batch_norm_problems(config: Config, model: VGG) -> list[str]:
    """Return a line if a batch norm that trains has one value per channel, whose variance is 0."""
    examples = config.batch_size // max(config.accumulation_steps, 1)
    frozen = model.layers_with_parameters(config.freeze)
    names = [layer.name for stage in model.stages for layer in stage if layer.kind == "bn"]
    for name in names:
        side = config.data.image_size // model.smallest_image(name)
        if name not in frozen and examples * side**2 == 1:
            return [
                f"config.batch_size is {config.batch_size}, in {config.accumulation_steps} micro-batch(es), and "
                f"config.data.image_size is {config.data.image_size}: batch norm {name} would have 1 value per "
                "channel; expected more than 1; use a larger batch or larger images, or freeze the layer"
            ]
    return []
