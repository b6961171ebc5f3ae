"""The classes of a run: taken from the data, kept in config.json and checkpoints, and compared when the run resumes."""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from vgg_jax.config import Config, DataConfig
from vgg_jax.console import log
from vgg_jax.data.dataset import Split
from vgg_jax.data.listing import normal, shortened
from vgg_jax.data.preprocessing import Preprocessing
from vgg_jax.errors import UserError
from vgg_jax.training.checkpoints import saved_steps
from vgg_jax.training.checksums import read_metadata
from vgg_jax.weights.imagenet_classes import imagenet_classes, imagenet_synsets


def resolve_classes(config: Config, split: Split) -> Config:
    """Return the configuration with the class names of the data and the number of classes in place of 0.

    Log a line if the network has more outputs than the data have classes.

    Args:
      config: the configuration of a run.
      split: its training split.

    Raises:
      UserError: if `config.data.class_names` differs from the names that the data state, or has another number.
    """
    given, stated = (tuple(map(normal, names)) for names in (config.data.class_names, split.class_names))
    if given and stated and given != stated:
        raise UserError(
            f"config.data.class_names differs from the classes of {split.name}: {difference(stated, given)}; "
            "remove config.data.class_names"
        )
    if given and len(given) != split.num_classes:
        raise UserError(
            f"config.data.class_names has {len(given)} names; expected {split.num_classes}, the classes of {split.name}"
        )
    number = config.model.num_classes or split.num_classes
    if number > split.num_classes:
        log(f"{number} outputs for {split.num_classes} classes")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_classes=number),
        data=dataclasses.replace(config.data, class_names=stated or given),
    )


def carried(config: Config) -> dict[str, Any]:
    """Return what each checkpoint states about the run's images and classes, as JSON values."""
    preprocessing = dataclasses.asdict(preprocessing_of(config.data))
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in preprocessing.items()}
    return {"class_names": list(config.data.class_names), "preprocessing": fields}


def preprocessing_of(data: DataConfig) -> Preprocessing:
    """Return the preprocessing of a run's evaluation."""
    order = "L" if len(data.mean) == 1 else "RGB"
    return Preprocessing(data.resize, data.image_size, data.mean, data.std, order, data.exif)


def saved_class_names(directory: str) -> tuple[str, ...]:
    """Return the class names in the newest intact checkpoint of a directory; () if there are none."""
    for step in reversed(saved_steps(directory)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a damaged checkpoint
            return tuple((read_metadata(os.path.join(directory, str(step)))["progress"] or {}).get("class_names", ()))
    return ()


def check_same_classes(workdir: str, old: Sequence[str], new: Sequence[str]) -> None:
    """Raise UserError if the classes of a run have changed: its outputs would then mean other classes.

    Args:
      workdir: the directory of the run.
      old: the class names of the run so far; empty if they are unknown, as for runs of older versions.
      new: the class names of the data.
    """
    old, new = [normal(name) for name in old], [normal(name) for name in new]
    if not old or old == new:
        return
    if not new:
        raise UserError(
            f"{workdir} was trained with class names, which the data do not state; expected {shortened(old)}; "
            "set --config.data.class_names to these names, or choose another --workdir"
        )
    raise UserError(
        f"{workdir} was trained on other classes: {difference(old, new)}; "
        "restore the classes of the data, or choose another --workdir"
    )


def difference(old: Sequence[str], new: Sequence[str]) -> str:
    """Return how the class names differ, as text."""
    parts = []
    if added := [name for name in new if name not in old]:
        parts.append(f"{shortened(added)} added")
    if missing := [name for name in old if name not in new]:
        parts.append(f"{shortened(missing)} missing")
    places = {name: (list(old).index(name), list(new).index(name)) for name in old if name in new}
    if moved := [f"{name} is {after}, was {before}" for name, (before, after) in places.items() if before != after]:
        parts.append(f"renumbered: {shortened(moved)}")
    return "; ".join(parts)


def output_names(class_names: Sequence[str], num_classes: int | None) -> tuple[str, ...] | None:
    """Return a name for each output of a run's network; None if the run has no class names.

    ImageNet's WordNet identifiers become ImageNet's names. Outputs without a class are called "unused output 5".
    """
    if not class_names or num_classes is None:
        return None
    names = imagenet_classes() if tuple(class_names) == imagenet_synsets() else tuple(class_names)
    return names + tuple(f"unused output {i}" for i in range(len(names), num_classes))
