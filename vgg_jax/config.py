"""The configuration of a run: a tree of dataclasses, and the checks that need nothing but its values.

A file under `configs/` builds a `Config` in `get_config()`; `--config.optimizer.learning_rate=0.05` overrides a field.
Values that follow from the fields are computed on use, after the overrides, and never stored.

The comment beside each field documents it: its meaning, the accepted values, and the meaning of 0 or of an empty value.
"""

import dataclasses
import math
import os
import re
import typing
from typing import Any

OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("constant", "step", "cosine", "linear", "plateau")
DECAYED = ("all", "kernels")
TRAIN_VIEWS = ("pad_crop", "random_resized_crop", "scale_crop")
PAD_MODES = ("zeros", "reflect")
CORRUPT_IMAGES = ("fail", "skip")
LOSSES = {"softmax": "softmax", "sigmoid": "sigmoid", "squared_error": "values"}  # to what the outputs mean
STATISTICS = ("global", "device")
DTYPES = ("float32", "bfloat16", "float64", "auto")
PRECISIONS = ("default", "high", "highest")


# No run-time type check of these classes: a field of type float also takes an int.
@typing.no_type_check
@dataclasses.dataclass
class ModelConfig:
    """The fields of `vgg_jax.VGG`; the defaults are VGG-16 with batch norm and the usual head for 32x32 images."""

    depth: int = 16  # number of layers with weights: 11, 13, 16 or 19 (columns A, B, D and E of the paper)
    batch_norm: bool = True  # batch norm after each convolution
    batch_norm_statistics: str = "global"  # of training batches: global, over all devices; device, each its own share
    lrn: bool = False  # local response normalization after conv1_1 (column A-LRN); needs depth 11
    conv1x1: bool = False  # 1x1 kernels in the last convolution of stages 3 to 5 (column C); needs depth 16
    num_classes: int = 0  # number of classes, the width of the last layer fc8; 0: that of the data
    pool_size: int = 1  # side of the adaptive average pool's output before the head; 7 in the paper
    hidden: tuple[int, ...] = ()  # widths of the hidden layers fc6 and fc7, at most two; (): only fc8
    pool_after: tuple[int, ...] = (1, 2, 3, 4, 5)  # stages, from 1 to 5, that end in a max pool
    dropout_rate: float = 0.5  # dropout rate after fc6 and fc7, at least 0 and below 1
    dtype: str = "float32"  # computation: float32, bfloat16, float64; auto: bfloat16 on GPU and TPU, else float32
    precision: str = "highest"  # of float32 products on GPU and TPU: default (TF32, bfloat16), high, highest (float32)
    remat: bool = False  # rematerialization: recompute each stage in the backward pass to save memory


@typing.no_type_check
@dataclasses.dataclass
class DataConfig:
    """The data set, and the way from its images to the input of the network."""

    dataset: str = "cifar10"  # name in TFDS, "digits", or a directory: of TFDS, or of [SPLIT/]CLASS/IMAGE
    data_dir: str = os.environ.get("TFDS_DATA_DIR", os.path.join("~", "tensorflow_datasets"))  # directory of TFDS
    train_split: str = "train"  # training split in the notation of TFDS, such as train[:90%]
    eval_split: str = "test"  # evaluation split, likewise
    classes: tuple[int, ...] = ()  # labels of the images to use, in rising order, unchanged; (): all images
    class_names: tuple[str, ...] = ()  # names of all classes by label; (): those that the data state, if any
    images_per_class: int = 0  # number of training images of each class, drawn by the seed; 0: all images
    image_size: int = 32  # side of the square input in pixels
    resize: int = 32  # short side of the test view in pixels, before its center crop of image_size
    train_view: str = "pad_crop"  # pad_crop, of the test view; random_resized_crop; scale_crop, as in the paper
    pad: int = 4  # padding of pad_crop in pixels on each side
    pad_mode: str = "zeros"  # pixels of that padding: zeros (black), or reflect (the image reflected at its edge)
    cutout: int = 0  # side of a random square of each training image that is hidden, in pixels; 0: no square
    train_scale: tuple[int, ...] = (256, 512)  # smallest and largest short side S of scale_crop in pixels
    flip: bool = True  # horizontal flip of half of the training images
    alternating_flip: bool = False  # horizontal flip of each image in every other epoch, not at random; needs flip
    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)  # mean of each channel, for pixels in [0, 1]
    std: tuple[float, ...] = (0.2470, 0.2435, 0.2616)  # standard deviation of each channel, for pixels in [0, 1]
    color_shift: float = 0.0  # std of the random shift along the principal axes of RGB, in eigenvalues; 0: no shift
    color_eigenvalues: tuple[float, ...] = (0.2175, 0.0188, 0.0045)  # of the covariance of RGB in [0, 1]
    color_eigenvectors: tuple[tuple[float, ...], ...] = (  # rows for R, G and B, one column for each eigenvalue
        (-0.5675, 0.7192, 0.4009),
        (-0.5808, -0.0045, -0.8140),
        (-0.5836, -0.6948, 0.4203),
    )
    exif: bool = True  # turn photographs by their EXIF orientation; False: leave them as torchvision does
    corrupt_images: str = "fail"  # fail: stop at an image that cannot be decoded; skip: use the next image instead
    num_threads: int = 0  # threads that decode images; 0: one for each processor that the process may use


@typing.no_type_check
@dataclasses.dataclass
class OptimizerConfig:
    """SGD with momentum or Adam as in PyTorch, and the schedule of the learning rate."""

    name: str = "sgd"  # optimizer: sgd, or adam with moments of 0.9 and 0.999
    learning_rate: float = 0.1  # learning rate after the warm-up
    reference_batch_size: int = 0  # batch size that learning_rate refers to (linear scaling rule); 0: no scaling
    momentum: float = 0.9  # momentum of sgd, at least 0 and below 1
    nesterov: bool = False  # Nesterov's momentum for sgd
    weight_decay: float = 5e-4  # weight decay, added to the gradient as in PyTorch
    decayed: str = "all"  # parameters that decay: all, or kernels (neither biases nor batch norm)
    clip_norm: float = 0.0  # largest global norm of the gradient; larger gradients are scaled down; 0: no clipping
    schedule: str = "cosine"  # learning rate: constant, step, cosine or linear (both to zero), plateau
    step_epochs: tuple[float, ...] = ()  # epochs at which the step schedule multiplies the rate by step_factor
    step_factor: float = 0.1  # factor of the step and plateau schedules
    plateau_patience: int = 5  # evaluations without a better accuracy (or rmse) after which plateau reduces the rate
    plateau_reductions: int = 3  # largest number of reductions by plateau
    warmup_epochs: float = 0.0  # epochs of linear warm-up from zero
    ema_decay: float = 0.0  # decay of the exponential moving average that is evaluated; 0: evaluate the network itself


@typing.no_type_check
@dataclasses.dataclass
class Config:
    """A whole run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)  # the network
    data: DataConfig = dataclasses.field(default_factory=DataConfig)  # the data
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)  # the optimizer
    batch_size: int = 128  # batch size of an update, over all devices; a multiple of accumulation_steps
    accumulation_steps: int = 1  # micro-batches per update (gradient accumulation); saves memory
    eval_batch_size: int = 512  # batch size of evaluation, over all devices
    num_epochs: float = 200.0  # length of the run in epochs
    shard_head: bool = False  # shard the fully connected layers over the devices instead of replicating them
    flip_eval: bool = False  # evaluate the mean of the logits of each image and its horizontal flip
    loss: str = "softmax"  # softmax (one class for each image), sigmoid (several labels) or squared_error (regression)
    label_smoothing: float = 0.0  # part of each label that the training loss spreads over all classes
    seed: int = 0  # seed of initialization, order of the data, augmentation and dropout
    init_from: str = ""  # source of the initial layers: weights file, directory of a run, or pretrained name
    init_layers: tuple[str, ...] = ("features",)  # layers taken from init_from: their names, "features" or "head"
    whitening: bool = False  # initialize conv1_1 with the principal axes of 3x3 patches of the training images
    freeze: tuple[str, ...] = ()  # layers to freeze: their names, "features" or "head"
    max_skipped_steps: int = 10  # consecutive steps with NaN or infinite values after which the run stops
    log_every_steps: int = 50  # steps from one log line to the next
    eval_every_epochs: float = 1.0  # epochs from one evaluation to the next
    checkpoint_every_epochs: float = 1.0  # epochs from one checkpoint to the next
    steps_per_dispatch: int = 0  # steps of one program if the data are resident; 0: 1 on CPUs, chosen elsewhere
    profile: str = ""  # steps to profile, START:STOP, both included, such as 101:110; "": none
    peak_tflops: float = 0.0  # peak of a device in TFLOP/s, for MFU; 0: the published one in bfloat16, if known

    @property
    def profiled_steps(self) -> range | None:
        """Return the steps to profile; None if there are none."""
        return steps_of(self.profile) if self.profile else None

    @property
    def step_size(self) -> int:
        """Return the examples of one step over all devices: a batch, or a micro-batch."""
        return self.batch_size // self.accumulation_steps

    @property
    def metric(self) -> str:
        """Return the metric beside the loss: accuracy, or rmse (root mean squared error) for a regression."""
        return "rmse" if self.loss == "squared_error" else "accuracy"

    @property
    def learning_rate(self) -> float:
        """Return the learning rate for this batch size."""
        reference = self.optimizer.reference_batch_size or self.batch_size
        return self.optimizer.learning_rate * self.batch_size / reference

    def steps_per_epoch(self, num_examples: int) -> int:
        """Return the steps of an epoch of `num_examples`, whose last, incomplete batch is dropped."""
        return num_examples // self.batch_size * self.accumulation_steps

    def num_steps(self, num_examples: int) -> int:
        """Return the steps of the whole run with `num_examples` training examples."""
        return max(1, round(self.num_epochs * (num_examples // self.batch_size))) * self.accumulation_steps


def steps_of(text: str) -> range | None:
    """Return the steps of START:STOP, both included; None if the text names no such steps."""
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
    return range(int(found[1]), int(found[2]) + 1) or None if found else None


def dtype_for(platform: str) -> str:
    """Return the dtype that `auto` stands for on a platform of JAX: cpu, gpu or tpu."""
    return "bfloat16" if platform in ("gpu", "tpu") else "float32"


def field_names(config_class: Any = Config, prefix: str = "") -> list[str]:
    """Return the names of all fields as after `--config.` on the command line, such as optimizer.learning_rate."""
    names = []
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(field.type):
            names += field_names(field.type, f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names


def type_problems(node: Any, path: str = "config") -> list[str]:
    """Return one line for each field with a value of a wrong type, or that is not finite."""
    problems = []
    for field in dataclasses.fields(node):
        value, where = getattr(node, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(field.type):
            if isinstance(value, typing.cast(type, field.type)):
                problems += type_problems(value, where)
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


def value_problems(config: Config) -> list[str]:
    """Return one line for each value that is not allowed, as far as no network is needed to tell."""
    problems = []
    for name, holds, expected in [*_run_checks(config), *_data_checks(config.data), *_optimizer_checks(config)]:
        if not holds:
            value: Any = config
            for part in name.split("."):
                value = getattr(value, part)
            problems.append(f"config.{name} is {value!r}; expected {expected}")
    return problems


Check = tuple[str, bool, str]  # a field, whether its value is allowed, and what is expected


def _run_checks(config: Config) -> list[Check]:
    return [
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
        ("steps_per_dispatch", config.steps_per_dispatch >= 0, "0 or more"),
        ("profile", config.profile == "" or steps_of(config.profile) is not None,
         "START:STOP, two rising steps from 1, such as 101:110"),
        ("peak_tflops", config.peak_tflops >= 0, "0 or more"),
        ("whitening", config.model.batch_norm or not config.whitening,
         "False, because config.model.batch_norm is False"),
        ("whitening", not (config.whitening and config.init_from and {"features", "conv1_1"} & set(config.init_layers)),
         "False, because conv1_1 comes from config.init_from"),
        ("label_smoothing", 0 <= config.label_smoothing < 1, "at least 0 and below 1"),
        ("loss", config.loss in LOSSES, f"one of {', '.join(LOSSES)}"),
        ("loss", config.loss != "softmax" or config.model.num_classes != 1,
         "sigmoid or squared_error, because the softmax of one output is always 1 (config.model.num_classes is 1)"),
        ("label_smoothing", config.loss != "squared_error" or not config.label_smoothing,
         "0, because config.loss is squared_error"),
        ("model.batch_norm_statistics", config.model.batch_norm_statistics in STATISTICS,
         f"one of {', '.join(STATISTICS)}"),
        ("model.dtype", config.model.dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
        ("model.precision", config.model.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
    ]  # fmt: skip


def _data_checks(data: DataConfig) -> list[Check]:
    scale = data.train_scale
    rises = len(scale) == 2 and data.image_size <= scale[0] <= scale[1]
    return [
        ("data.classes", data.classes == tuple(sorted(set(data.classes))), "labels in rising order"),
        ("data.class_names", len(set(data.class_names)) == len(data.class_names) and "" not in data.class_names,
         "a different name for each class"),
        ("data.images_per_class", data.images_per_class >= 0, "0 or more"),
        ("data.image_size", data.image_size > 0, "1 or more"),
        ("data.resize", data.resize >= data.image_size, f"at least config.data.image_size, {data.image_size}"),
        ("data.train_view", data.train_view in TRAIN_VIEWS, f"one of {', '.join(TRAIN_VIEWS)}"),
        ("data.pad", data.pad >= 0, "0 or more"),
        ("data.pad_mode", data.pad_mode in PAD_MODES, f"one of {', '.join(PAD_MODES)}"),
        ("data.pad", data.pad_mode != "reflect" or data.pad < max(data.image_size, 1),
         f"below config.data.image_size, {data.image_size}, for config.data.pad_mode=reflect"),
        ("data.cutout", 0 <= data.cutout <= max(data.image_size, 0),
         f"0 up to config.data.image_size, {data.image_size}"),
        ("data.std", all(s > 0 for s in data.std), "more than 0 for each channel"),
        ("data.mean", len(data.mean) == len(data.std), f"as many channels as config.data.std, {len(data.std)}"),
        ("data.train_scale", rises or data.train_view != "scale_crop",
         f"two rising sides of at least config.data.image_size, {data.image_size}"),
        ("data.alternating_flip", data.flip or not data.alternating_flip, "False, because config.data.flip is False"),
        ("data.color_shift", data.color_shift >= 0, "0 or more"),
        ("data.color_eigenvalues", len(data.color_eigenvalues) == 3, "three"),
        ("data.color_eigenvectors", [len(row) for row in data.color_eigenvectors] == [3, 3, 3], "three rows of three"),
        ("data.mean", len(data.mean) == 3 or not data.color_shift, "three channels for config.data.color_shift"),
        ("data.corrupt_images", data.corrupt_images in CORRUPT_IMAGES, f"one of {', '.join(CORRUPT_IMAGES)}"),
        ("data.num_threads", data.num_threads >= 0, "0 or more"),
    ]  # fmt: skip


def _optimizer_checks(config: Config) -> list[Check]:
    optimizer = config.optimizer
    return [
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
        ("optimizer.warmup_epochs", 0 <= optimizer.warmup_epochs < config.num_epochs, "0 or more, below num_epochs"),
    ]  # fmt: skip
