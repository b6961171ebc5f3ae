"""The checks of a configuration's values that need nothing but these values."""

from typing import Any

from vgg_jax.config import (
    CORRUPT_IMAGES,
    DECAYED,
    DTYPES,
    LOSSES,
    OPTIMIZERS,
    PAD_MODES,
    PRECISIONS,
    SCHEDULES,
    STATISTICS,
    TRAIN_VIEWS,
    Config,
    numbers_of,
    rates_of,
    steps_of,
)


def value_problems(config: Config) -> list[str]:
    """Return one line for each value that is not allowed, as far as no network is needed to tell."""
    problems = []
    for name, holds, expected in [check for checks in CHECKS for check in checks(config)]:
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


def _data_checks(config: Config) -> list[Check]:
    data, scale = config.data, config.data.train_scale
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
        ("data.erasing", 0 <= data.erasing <= 1, "0 up to 1"),
        ("data.erasing_area", _rises(data.erasing_area) and data.erasing_area[1] <= 1,
         "two rising parts, more than 0 and at most 1"),
        ("data.erasing_aspect", _rises(data.erasing_aspect), "two rising ratios, more than 0"),
        ("data.balanced", not (data.balanced and data.alternating_flip),
         "False, because config.data.alternating_flip needs each image once in an epoch"),
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
        *_rate_checks(optimizer.rates),
        ("optimizer.schedule", optimizer.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
        ("optimizer.step_epochs", list(optimizer.step_epochs) == sorted(optimizer.step_epochs), "rising epochs"),
        ("optimizer.step_factor", optimizer.step_factor > 0, "more than 0"),
        ("optimizer.step_factor", optimizer.schedule != "plateau" or optimizer.step_factor < 1, "below 1 for plateau"),
        ("optimizer.plateau_patience", optimizer.plateau_patience > 0, "1 or more"),
        ("optimizer.plateau_reductions", optimizer.plateau_reductions >= 0, "0 or more"),
        ("optimizer.warmup_epochs", 0 <= optimizer.warmup_epochs < config.num_epochs, "0 or more, below num_epochs"),
    ]  # fmt: skip


def _rate_checks(text: str) -> list[Check]:
    factors = rates_of(text)
    if factors is None:
        return [("optimizer.rates", False, "NAME=FACTOR, each name once, such as features=0.1,head=1")]
    frozen = [name for name, factor in factors.items() if factor == 0]
    names = f"({', '.join(repr(name) for name in frozen)},)"
    return [
        ("optimizer.rates", not frozen, f"factors of more than 0; to freeze these layers, set config.freeze={names}"),
        ("optimizer.rates", all(0 <= factor < float("inf") for factor in factors.values()), "factors of more than 0"),
    ]


def _habit_checks(config: Config) -> list[Check]:
    """Return the checks of mixing, class weights, early stopping and the accuracy of each class."""
    weights = config.class_weights
    numbers = weights in ("", "balanced") or all(0 < n < float("inf") for n in numbers_of(weights) or (0,))
    step_size = config.batch_size // max(config.accumulation_steps, 1)
    patience = config.early_stopping_patience
    return [
        ("mixup", config.mixup >= 0, "0 or more"),
        ("cutmix", config.cutmix >= 0, "0 or more"),
        *((name, not getattr(config, name) or step_size > 1, "0, because a step has one image and no pair")
          for name in ("mixup", "cutmix")),
        ("cutmix", not config.cutmix or config.loss != "squared_error",
         "0, because config.loss is squared_error: the area of a box is no part of a number"),
        ("class_weights", numbers, "balanced, or a number of more than 0 for each class, such as 1,2.5,1"),
        ("class_weights", not weights or config.loss == "softmax", f'"", because config.loss is {config.loss}'),
        ("class_weights", weights != "balanced" or not config.data.balanced,
         '"", because config.data.balanced already draws each class equally often'),
        ("init_step", config.init_step in ("latest", "best") or config.init_step.isdecimal(),
         "latest, best or the number of a step"),
        ("init_step", bool(config.init_from) or config.init_step == "latest",
         "latest, because config.init_from is empty"),
        ("per_class_accuracy", not (config.per_class_accuracy and config.loss == "squared_error"),
         "False, because config.loss is squared_error"),
        ("early_stopping_patience", patience >= 0, "0 or more"),
        ("early_stopping_min_delta", config.early_stopping_min_delta >= 0, "0 or more"),
        ("early_stopping_min_delta", patience > 0 or not config.early_stopping_min_delta,
         "0, because config.early_stopping_patience is 0"),
    ]  # fmt: skip


def _cache_checks(config: Config) -> list[Check]:
    """Return the check that no augmentation changes the images that the cached features are computed from."""
    data = config.data
    changing = {
        "data.train_view": data.train_view if data.train_view != "pad_crop" else "",
        "data.pad": data.pad if data.train_view == "pad_crop" else 0,
        "data.cutout": data.cutout,
        "data.erasing": data.erasing,
        "data.color_shift": data.color_shift,
        "mixup": config.mixup,
        "cutmix": config.cutmix,
    }
    named = ", ".join(f"config.{name}={value}" for name, value in changing.items() if value)
    return [
        ("cache_features", not (config.cache_features and named),
         f"False, because {named} changes the images in each epoch; only config.data.flip can be cached"),
        ("cache_features", not (config.cache_features and data.corrupt_images == "skip"),
         "False, because config.data.corrupt_images is skip"),
        ("features_dir", config.features_dir != "" or not config.cache_features, "a directory"),
    ]  # fmt: skip


def _rises(pair: tuple[float, ...]) -> bool:
    return len(pair) == 2 and 0 < pair[0] <= pair[1]


CHECKS = (_run_checks, _data_checks, _optimizer_checks, _habit_checks, _cache_checks)
