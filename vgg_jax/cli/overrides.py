"""The overrides of fields on a command line: names that users type, and fields that follow from an override."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from vgg_jax.config import Config, field_names
from vgg_jax.errors import UserError

# Names that other programs use, without underscores, and the field with that meaning.
ALIASES = {
    "lr": "optimizer.learning_rate",
    "baselr": "optimizer.learning_rate",
    "initlr": "optimizer.learning_rate",
    "maxlr": "optimizer.learning_rate",
    "wd": "optimizer.weight_decay",
    "decay": "optimizer.weight_decay",
    "l2": "optimizer.weight_decay",
    "opt": "optimizer.name",
    "optimizer": "optimizer.name",
    "optim": "optimizer.name",
    "sched": "optimizer.schedule",
    "scheduler": "optimizer.schedule",
    "lrscheduler": "optimizer.schedule",
    "lrschedule": "optimizer.schedule",
    "gamma": "optimizer.step_factor",
    "lrgamma": "optimizer.step_factor",
    "milestones": "optimizer.step_epochs",
    "patience": "optimizer.plateau_patience",
    "warmup": "optimizer.warmup_epochs",
    "lrwarmupepochs": "optimizer.warmup_epochs",
    "ema": "optimizer.ema_decay",
    "modelemadecay": "optimizer.ema_decay",
    "clip": "optimizer.clip_norm",
    "clipgrad": "optimizer.clip_norm",
    "clipgradnorm": "optimizer.clip_norm",
    "gradclip": "optimizer.clip_norm",
    "maxgradnorm": "optimizer.clip_norm",
    "bs": "batch_size",
    "batch": "batch_size",
    "trainbatchsize": "batch_size",
    "epochs": "num_epochs",
    "epoch": "num_epochs",
    "nepochs": "num_epochs",
    "maxepochs": "num_epochs",
    "valbatchsize": "eval_batch_size",
    "testbatchsize": "eval_batch_size",
    "accum": "accumulation_steps",
    "accumsteps": "accumulation_steps",
    "gradaccum": "accumulation_steps",
    "gradaccumsteps": "accumulation_steps",
    "gradientaccumulationsteps": "accumulation_steps",
    "smoothing": "label_smoothing",
    "mixupalpha": "mixup",
    "cutmixalpha": "cutmix",
    "reprob": "data.erasing",
    "randomerase": "data.erasing",
    "randomerasing": "data.erasing",
    "classweight": "class_weights",
    "earlystopping": "early_stopping_patience",
    "mindelta": "early_stopping_min_delta",
    "randomseed": "seed",
    "pretrained": "init_from",
    "weights": "init_from",
    "initcheckpoint": "init_from",
    "logevery": "log_every_steps",
    "loginterval": "log_every_steps",
    "printfreq": "log_every_steps",
    "evalevery": "eval_every_epochs",
    "saveevery": "checkpoint_every_epochs",
    "savefreq": "checkpoint_every_epochs",
    "layers": "model.depth",
    "numlayers": "model.depth",
    "bn": "model.batch_norm",
    "dropout": "model.dropout_rate",
    "classes": "model.num_classes",
    "nclasses": "model.num_classes",
    "nbclasses": "model.num_classes",
    "mixedprecision": "model.dtype",
    "amp": "model.dtype",
    "gradientcheckpointing": "model.remat",
    "checkpointing": "model.remat",
    "data": "data.dataset",
    "datapath": "data.dataset",
    "root": "data.data_dir",
    "dataroot": "data.data_dir",
    "imgsize": "data.image_size",
    "imgsz": "data.image_size",
    "inputsize": "data.image_size",
    "cropsize": "data.image_size",
    "size": "data.image_size",
    "traincropsize": "data.image_size",
    "resizesize": "data.resize",
    "valresizesize": "data.resize",
    "workers": "data.num_threads",
    "numworkers": "data.num_threads",
    "threads": "data.num_threads",
    "hflip": "data.flip",
}
# Names that other programs use for the other flags of `train`.
FLAG_ALIASES = {
    "output": "workdir",
    "outputdir": "workdir",
    "outdir": "workdir",
    "out": "workdir",
    "logdir": "workdir",
    "savedir": "workdir",
    "rundir": "workdir",
    "resume": "workdir",
    "cfg": "config",
    "configfile": "config",
}


def close_field(name: str) -> str | None:
    """Return the field that a wrong name stands for, or None.

    Args:
      name: what the user typed after `config.` or `--`, such as lr, optimizer.lr or batch-size.
    """
    names = field_names()
    plain = {field.replace("_", ""): field for field in names}
    plain_leaves = {field.rpartition(".")[2].replace("_", ""): field for field in reversed(names)}
    *parents, leaf = name.lower().replace("-", "").replace("_", "").split(".")
    if found := plain.get(".".join([*parents, leaf])):
        return found
    alias = ALIASES.get(leaf)
    for candidate in (alias, plain_leaves.get(leaf)) if not parents else (plain_leaves.get(leaf), alias):
        if candidate and (not parents or candidate.startswith(parents[-1] + ".")):
            return candidate
    if found := plain_leaves.get(leaf) or alias:
        return found
    if close := difflib.get_close_matches(name.replace("-", "_"), names, n=1):
        return close[0]
    close = difflib.get_close_matches(leaf, [*plain_leaves, *ALIASES], n=1, cutoff=0.75)
    return {**ALIASES, **plain_leaves}[close[0]] if close else None


def check_field_name(name: str) -> None:
    """Raise UserError if `name` is not a field; suggest the one that the user means."""
    names = field_names()
    if name in names:
        return
    siblings = [n for n in names if n.rpartition(".")[0] == name.rpartition(".")[0]]
    inside = [n for n in names if n.startswith(name + ".")]
    close = close_field(name)
    remedy = f"; did you mean config.{close}?" if close else ""
    raise UserError(f"config.{name} is not a field; expected one of {', '.join(inside or siblings or names)}{remedy}")


def check_flag(argument: str, flags: list[str]) -> None:
    """Raise UserError if an argument is a flag that `train` does not have; suggest the field or flag that is meant.

    Args:
      argument: the argument, such as --batch_size=32, --lr or --workdir.
      flags: the names of the flags.
    """
    name, equals, value = argument.lstrip("-").partition("=")
    if not argument.startswith("-") or name in flags or name.removeprefix("no") in flags:
        return
    plain = name.lower().replace("-", "").replace("_", "")
    known = {flag.replace("_", ""): flag for flag in flags} | FLAG_ALIASES
    if flag := known.get(plain):
        meant = f"--{flag}"
    elif field := close_field(name):
        meant = f"--config.{field}"
    elif close := difflib.get_close_matches(plain, known, n=1):
        meant = f"--{known[close[0]]}"
    else:
        raise UserError(f"{argument} is not a flag; expected --config.FIELD=VALUE or one of --help")
    raise UserError(f"--{name} is not a flag; did you mean {meant}{equals}{value}?")


def with_dependents(config: Config, given: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """Return the configuration with the fields that follow from the overrides, and one line for each change.

    A field that the user gave never changes.

    Args:
      config: the configuration, with the overrides.
      given: the overridden fields, such as data.image_size, each with its value before.
    """
    lines: list[str] = []
    data = dataclasses.replace(config.data)
    optimizer = dataclasses.replace(config.optimizer)

    def follow(node: Any, name: str, value: Any, reason: str) -> None:
        field = name.rpartition(".")[2]
        if name not in given and getattr(node, field) != value:
            lines.append(f"config.{name} is {value}, was {getattr(node, field)}: {reason}")
            setattr(node, field, value)

    before = given.get("data.image_size", data.image_size)
    if _is_positive(before) and _is_positive(data.image_size) and before != data.image_size:
        ratio, reason = data.image_size / before, f"it follows config.data.image_size, {data.image_size}, was {before}"
        follow(data, "data.resize", max(round(data.resize * ratio), data.image_size), reason)
        if data.train_view == "scale_crop":
            sides = tuple(max(round(side * ratio), data.image_size) for side in data.train_scale)
            follow(data, "data.train_scale", sides, reason)
    if "data.flip" in given and not data.flip:
        follow(data, "data.alternating_flip", False, "config.data.flip is False")
    epochs = config.num_epochs
    if "num_epochs" in given and isinstance(epochs, int | float) and 0 < epochs <= optimizer.warmup_epochs:
        follow(optimizer, "optimizer.warmup_epochs", epochs / 2, f"half of config.num_epochs, {epochs:g}")
    if optimizer.schedule == "step" and (late := [n for n in optimizer.step_epochs if n >= epochs]):
        names = ", ".join(f"{n:g}" for n in late)
        lines.append(f"config.optimizer.step_epochs has {names}, not before the end, config.num_epochs {epochs:g}")
    return dataclasses.replace(config, data=data, optimizer=optimizer), lines


def _is_positive(value: Any) -> bool:
    return type(value) is int and value > 0
