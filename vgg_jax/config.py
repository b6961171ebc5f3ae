"""The configuration of a run: a tree of dataclasses, and the check of their types.

`training.field_checks` holds the checks of the values.

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
    balanced: bool = False  # draw each class equally often; images of rare classes come several times in an epoch
    image_size: int = 32  # side of the square input in pixels
    resize: int = 32  # short side of the test view in pixels, before its center crop of image_size
    train_view: str = "pad_crop"  # pad_crop, of the test view; random_resized_crop; scale_crop, as in the paper
    pad: int = 4  # padding of pad_crop in pixels on each side
    pad_mode: str = "zeros"  # pixels of that padding: zeros (black), or reflect (the image reflected at its edge)
    cutout: int = 0  # side of a random square of each training image that is hidden, in pixels; 0: no square
    erasing: float = 0.0  # probability that a random rectangle of a training image is erased; 0: no rectangle
    erasing_area: tuple[float, ...] = (0.02, 0.33)  # smallest and largest part of the image that it covers
    erasing_aspect: tuple[float, ...] = (0.3, 3.3)  # smallest and largest ratio of its height to its width
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
    rates: str = ""  # factors of the rate by layer, such as features=0.1,stage5=0.5: the narrowest name counts
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
    mixup: float = 0.0  # alpha of mixup, which mixes pairs of images and their labels; 0: no mixup
    cutmix: float = 0.0  # alpha of cutmix, which pastes a box of another image; half of the steps if mixup is on too
    class_weights: str = ""  # weights of the classes in the loss: balanced, or numbers such as 1,2.5,1; "": all equal
    seed: int = 0  # seed of initialization, order of the data, augmentation and dropout
    init_from: str = ""  # source of the initial layers: a file, run, folder, hf-hub:OWNER/NAME or pretrained name
    init_step: str = "latest"  # checkpoint, if init_from is a run: latest, best, or the number of a step
    init_layers: tuple[str, ...] = ("features",)  # layers taken from init_from: names, "features", "head", "stage1"...
    whitening: bool = False  # initialize conv1_1 with the principal axes of 3x3 patches of the training images
    freeze: tuple[str, ...] = ()  # layers to freeze: their names, "features", "head", "stage1" to "stage5"
    cache_features: bool = False  # compute the output of the first, frozen layers once, and keep it on disk
    features_dir: str = os.path.join("~", ".cache", "vgg_jax", "features")  # directory of these outputs
    max_skipped_steps: int = 10  # consecutive steps with NaN or infinite values after which the run stops
    log_every_steps: int = 50  # steps from one log line to the next
    eval_every_epochs: float = 1.0  # epochs from one evaluation to the next
    per_class_accuracy: bool = False  # report the accuracy of each class after each evaluation
    early_stopping_patience: int = 0  # evaluations without a better accuracy (or rmse) that end the run; 0: no limit
    early_stopping_min_delta: float = 0.0  # smallest gain that counts as better, such as 0.001
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


def numbers_of(text: str) -> tuple[float, ...] | None:
    """Return the numbers of a list such as 1,2.5,1; None if the text is no such list."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return None


def rates_of(text: str) -> dict[str, float] | None:
    """Return the factors of a list such as features=0.1,head=1 by name; None if the text is no such list."""
    pairs = [part.strip().split("=") for part in text.split(",")] if text else []
    factors = [numbers_of(pair[1]) if len(pair) == 2 else None for pair in pairs]
    names = [pair[0].strip() for pair in pairs]
    if None in factors or len(set(names)) < len(names):
        return None
    return {name: factor[0] for name, factor in zip(names, factors, strict=True) if factor}


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
