"""The configuration of a run: a tree of dataclasses, and every check that can be made before the first step.

Files under `configs/` build a `Config` in `get_config()`; `--config.optimizer.learning_rate=0.05` overrides a field.
What follows from the fields is computed where it is needed, after the overrides, and never stored.
"""

import dataclasses
import difflib
import math
import os
import typing
from typing import Any

from vgg_jax.errors import UserError
from vgg_jax.model import VGG

OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("constant", "step", "cosine", "plateau")
DECAYED = ("all", "kernels")
TRAIN_VIEWS = ("pad_crop", "random_resized_crop", "scale_crop")
CORRUPT_IMAGES = ("fail", "skip")
DTYPES = ("float32", "bfloat16", "float64", "auto")


@dataclasses.dataclass
class ModelConfig:
    """The fields of `vgg_jax.VGG`, with the head that suits small images."""

    depth: int = 16
    batch_norm: bool = True
    lrn: bool = False
    conv1x1: bool = False
    num_classes: int = 10
    pool_size: int = 1
    hidden: tuple[int, ...] = ()
    pool_after: tuple[int, ...] = (1, 2, 3, 4, 5)
    dropout_rate: float = 0.5
    # The dtype of the computation; parameters are float32, or float64 with it. auto: bfloat16 on GPU and TPU, float32
    # on a CPU. A run that is resumed keeps its dtype.
    dtype: str = "float32"
    remat: bool = False


@dataclasses.dataclass
class DataConfig:
    """Which TFDS data set, and how its images become the network's input."""

    dataset: str = "cifar10"  # TFDS's name, "digits", or a directory: of TFDS, or of images as SPLIT/CLASS/IMAGE
    data_dir: str = os.environ.get("TFDS_DATA_DIR", os.path.join("~", "tensorflow_datasets"))
    train_split: str = "train"  # TFDS's notation: train[:90%] is the first part of it
    eval_split: str = "test"
    classes: tuple[int, ...] = ()  # only the images of these labels, which stay what they are; (): of all
    images_per_class: int = 0  # so many training images of each class, drawn by the seed; 0: all
    image_size: int = 32  # the side of the square input, in pixels
    resize: int = 32  # test view: short side to `resize`, then the centre `image_size`
    train_view: str = "pad_crop"  # of the test view, on the device; or random_resized_crop, scale_crop, on the host
    pad: int = 4  # of pad_crop: pixels of zeros on each side
    train_scale: tuple[int, ...] = (256, 512)  # of scale_crop: the short side S is drawn from the one to the other
    flip: bool = True  # mirror half of the training images
    alternating_flip: bool = False  # mirror each image in every other epoch, instead of by chance
    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)  # per channel, of pixels in [0, 1]
    std: tuple[float, ...] = (0.2470, 0.2435, 0.2616)
    color_shift: float = 0.0  # standard deviation of the shift along the principal axes of RGB, times their eigenvalue
    color_eigenvalues: tuple[float, ...] = (0.2175, 0.0188, 0.0045)  # of the covariance of RGB in [0, 1]: ImageNet's
    color_eigenvectors: tuple[tuple[float, ...], ...] = (  # a row for each of R, G, B, a column for each eigenvalue
        (-0.5675, 0.7192, 0.4009),
        (-0.5808, -0.0045, -0.8140),
        (-0.5836, -0.6948, 0.4203),
    )
    corrupt_images: str = "fail"  # or skip: the next image takes the place of one that cannot be decoded
    num_threads: int = 8  # that decode images


@dataclasses.dataclass
class OptimizerConfig:
    """SGD with momentum or Adam, as PyTorch's, and the learning rate's schedule."""

    name: str = "sgd"  # or adam, with the usual moments of 0.9 and 0.999
    learning_rate: float = 0.1
    reference_batch_size: int = 0  # that learning_rate is for: it grows in proportion to batch_size; 0: it does not
    momentum: float = 0.9  # of sgd
    nesterov: bool = False  # of sgd
    weight_decay: float = 5e-4
    decayed: str = "all"  # which parameters decay: all; or kernels, neither biases nor batch norm
    clip_norm: float = 0.0  # the gradient is scaled down to this global norm; 0: it is not
    schedule: str = "cosine"  # to zero; step: times `step_factor` at each of `step_epochs`; plateau; constant
    step_epochs: tuple[float, ...] = ()
    step_factor: float = 0.1  # of plateau too: whenever `plateau_patience` evaluations have found no better accuracy
    plateau_patience: int = 5
    plateau_reductions: int = 3  # at most so many
    warmup_epochs: float = 0.0  # the rate rises linearly from zero
    ema_decay: float = 0.0  # of the moving average of the network, which is evaluated instead of it; 0: there is none


@dataclasses.dataclass
class Config:
    """A whole run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    batch_size: int = 128  # over all devices
    accumulation_steps: int = 1  # parts that a batch comes in, one after the other, each a step: saves memory
    eval_batch_size: int = 512
    num_epochs: float = 200.0
    shard_head: bool = False  # the fully connected layers lie in parts on the devices, not whole on each
    flip_eval: bool = False  # evaluation averages the logits of each image and its mirror image
    label_smoothing: float = 0.0  # of the training loss: so much of each label is spread over all classes
    seed: int = 0  # of the initialisation, the order, the augmentation and dropout
    init_from: str = ""  # a file of weights, a run's directory or a name of load_pretrained
    init_layers: tuple[str, ...] = ("features",)  # that are taken from it: names of layers, "features", "head"
    freeze: tuple[str, ...] = ()  # the layers that stay as they are, named likewise
    max_skipped_steps: int = 10  # so many in a row, whose loss, gradient or statistics are not finite, end the run
    log_every_steps: int = 50
    eval_every_epochs: float = 1.0
    checkpoint_every_epochs: float = 1.0

    @property
    def step_size(self) -> int:
        """The examples of one step, over all devices: the batch size, or of a part of a batch."""
        return self.batch_size // self.accumulation_steps

    @property
    def learning_rate(self) -> float:
        """The learning rate for this batch size."""
        reference = self.optimizer.reference_batch_size or self.batch_size
        return self.optimizer.learning_rate * self.batch_size / reference

    def steps_per_epoch(self, num_examples: int) -> int:
        """The steps of an epoch of so many examples, of which the last, incomplete batch is left out."""
        return num_examples // self.batch_size * self.accumulation_steps

    def num_steps(self, num_examples: int) -> int:
        """The steps of the whole run."""
        return max(1, round(self.num_epochs * (num_examples // self.batch_size))) * self.accumulation_steps


def dtype_for(platform: str) -> str:
    """Return the dtype that `auto` stands for on a platform of JAX: cpu, gpu or tpu."""
    return "bfloat16" if platform in ("gpu", "tpu") else "float32"


def create_model(config: ModelConfig) -> VGG:
    """Return the network of a configuration.

    Raises:
      UserError: if the dtype is still `auto`. `run_directory.resolve_dtype` replaces it.
    """
    if config.dtype == "auto":
        raise UserError("dtype is 'auto'; expected float32, bfloat16 or float64: call resolve_dtype first")
    param_dtype = "float64" if config.dtype == "float64" else "float32"
    return VGG(**dataclasses.asdict(config), param_dtype=param_dtype)


def field_names(config_class: Any = Config, prefix: str = "") -> list[str]:
    """The names of all fields, as after `--config.` on the command line: optimizer.learning_rate, ..."""
    names = []
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(field.type):
            names += field_names(field.type, f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names


def check_field_name(name: str) -> None:
    """Raises UserError where `name` is no field, with the one that was probably meant."""
    names = field_names()
    if name in names:
        return
    siblings = [n for n in names if n.rpartition(".")[0] == name.rpartition(".")[0]]
    inside = [n for n in names if n.startswith(name + ".")]
    close = difflib.get_close_matches(name, names, n=1)
    meant = f"did you mean config.{close[0]}? " if close else ""
    raise UserError(f"config.{name} is not a field; {meant}Fields there: {', '.join(inside or siblings or names)}")


def validate(config: Config) -> None:
    """Checks all that can be known before data and devices are.

    Raises:
      UserError: with one line for each problem: what was found and what is allowed.
    """
    problems = _type_problems(config, "config")
    if not problems:
        problems = _value_problems(config)
    if problems:
        raise UserError("\n".join(problems))


def _type_problems(node: Any, path: str) -> list[str]:
    problems = []
    for field in dataclasses.fields(node):
        value, where = getattr(node, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(field.type):
            if isinstance(value, typing.cast(type, field.type)):
                problems += _type_problems(value, where)
            else:
                problems.append(f"{where} is {value!r}; expected a {typing.cast(type, field.type).__name__}")
        elif not _has_type(value, field.type):
            name = getattr(field.type, "__name__", str(field.type)) if not typing.get_args(field.type) else field.type
            problems.append(f"{where} is {value!r}; expected {name}")
        elif any(isinstance(number, float) and not math.isfinite(number) for number in _numbers(value)):
            problems.append(f"{where} is {value!r}; expected finite numbers")
    return problems


def _numbers(value: Any) -> list[Any]:
    return [n for v in value for n in _numbers(v)] if isinstance(value, tuple) else [value]


def _has_type(value: Any, annotation: Any) -> bool:
    if typing.get_origin(annotation) is tuple:
        return isinstance(value, tuple) and all(_has_type(v, typing.get_args(annotation)[0]) for v in value)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is annotation


def _is_scale(data: DataConfig) -> bool:
    if data.train_view != "scale_crop":
        return True
    return len(data.train_scale) == 2 and data.image_size <= data.train_scale[0] <= data.train_scale[1]


def _value_problems(config: Config) -> list[str]:
    data, optimizer = config.data, config.optimizer
    checks = [
        ("batch_size", config.batch_size > 0, "1 or more"),
        ("eval_batch_size", config.eval_batch_size > 0, "1 or more"),
        ("num_epochs", config.num_epochs > 0, "more than 0"),
        ("accumulation_steps", config.accumulation_steps > 0, "1 or more"),
        ("batch_size", config.batch_size % max(config.accumulation_steps, 1) == 0,
         f"a multiple of config.accumulation_steps, {config.accumulation_steps}"),
        ("seed", 0 <= config.seed < 2**32, "0 up to 2**32 - 1"),
        ("max_skipped_steps", config.max_skipped_steps > 0, "1 or more"),
        ("log_every_steps", config.log_every_steps > 0, "1 or more"),
        ("eval_every_epochs", config.eval_every_epochs > 0, "more than 0"),
        ("checkpoint_every_epochs", config.checkpoint_every_epochs > 0, "more than 0"),
        ("model.dtype", config.model.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
        ("data.classes", data.classes == tuple(sorted(set(data.classes))), "labels in rising order"),
        ("data.images_per_class", data.images_per_class >= 0, "0 or more"),
        ("data.image_size", data.image_size > 0, "1 or more"),
        ("data.resize", data.resize >= data.image_size, f"at least config.data.image_size, {data.image_size}"),
        ("data.train_view", data.train_view in TRAIN_VIEWS, f"one of {', '.join(TRAIN_VIEWS)}"),
        ("data.pad", data.pad >= 0, "0 or more"),
        ("data.std", all(s > 0 for s in data.std), "more than 0 for each channel"),
        ("data.mean", len(data.mean) == len(data.std), f"as many channels as config.data.std, {len(data.std)}"),
        ("data.train_scale", _is_scale(data), f"two rising sides from config.data.image_size, {data.image_size}, on"),
        ("data.alternating_flip", data.flip or not data.alternating_flip, "False where config.data.flip is"),
        ("data.color_shift", data.color_shift >= 0, "0 or more"),
        ("data.color_eigenvalues", len(data.color_eigenvalues) == 3, "three"),
        ("data.color_eigenvectors", [len(row) for row in data.color_eigenvectors] == [3, 3, 3], "three rows of three"),
        ("data.mean", len(data.mean) == 3 or not data.color_shift, "three channels, for config.data.color_shift"),
        ("data.corrupt_images", data.corrupt_images in CORRUPT_IMAGES, f"one of {', '.join(CORRUPT_IMAGES)}"),
        ("data.num_threads", data.num_threads >= 0, "0 or more"),
        ("optimizer.name", optimizer.name in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
        ("optimizer.learning_rate", optimizer.learning_rate > 0, "more than 0"),
        ("optimizer.reference_batch_size", optimizer.reference_batch_size >= 0, "0 or more"),
        ("optimizer.decayed", optimizer.decayed in DECAYED, f"one of {', '.join(DECAYED)}"),
        ("optimizer.ema_decay", 0 <= optimizer.ema_decay < 1, "at least 0 and below 1"),
        ("optimizer.momentum", 0 <= optimizer.momentum < 1, "at least 0 and below 1"),
        ("optimizer.weight_decay", optimizer.weight_decay >= 0, "0 or more"),
        ("optimizer.clip_norm", optimizer.clip_norm >= 0, "0 or more"),
        ("optimizer.schedule", optimizer.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
        ("optimizer.step_epochs", list(optimizer.step_epochs) == sorted(optimizer.step_epochs), "rising epochs"),
        ("optimizer.step_factor", optimizer.step_factor > 0, "more than 0"),
        ("optimizer.step_factor", optimizer.schedule != "plateau" or optimizer.step_factor < 1, "below 1 for plateau"),
        ("optimizer.plateau_patience", optimizer.plateau_patience > 0, "1 or more"),
        ("optimizer.plateau_reductions", optimizer.plateau_reductions >= 0, "0 or more"),
        ("label_smoothing", 0 <= config.label_smoothing < 1, "at least 0 and below 1"),
        ("optimizer.warmup_epochs", 0 <= optimizer.warmup_epochs < config.num_epochs, "0 or more, below num_epochs"),
    ]  # fmt: skip
    problems = []
    for name, holds, allowed in checks:
        if not holds:
            value: Any = config
            for part in name.split("."):
                value = getattr(value, part)
            problems.append(f"config.{name} is {value!r}; expected {allowed}")
    try:
        model = create_model(dataclasses.replace(config.model, dtype="float32"))  # whatever the dtype, the same layers
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
                    problems.append("config.freeze has all layers; expected some that train")
        if config.init_from and not problems:
            taken, frozen = (model.layers_with_parameters(names) for names in (config.init_layers, config.freeze))
            if not taken:
                problems.append("config.init_layers is (); expected the layers to take from config.init_from")
            if strangers := [layer for layer in frozen if layer not in taken]:
                problems.append(f"config.freeze has {', '.join(strangers)}; expected layers of config.init_layers")
        smallest = 2 ** len(model.pool_after)
        if data.image_size < smallest:
            problems.append(
                f"config.data.image_size is {data.image_size}; expected at least {smallest}, "
                f"which the max pools of config.model.pool_after need"
            )
    return problems
