"""The directory of a run: made and checked before the first step, with the run's configuration in it."""

import dataclasses
import json
import os
from typing import Any

from vgg_jax.config import Config
from vgg_jax.errors import UserError

# What may change when a run goes on: nothing that the steps taken so far depend on.
MAY_CHANGE = {
    "num_epochs",
    "eval_batch_size",
    "flip_eval",
    "shard_head",
    "log_every_steps",
    "eval_every_epochs",
    "checkpoint_every_epochs",
    "data.data_dir",
    "data.num_threads",
}


def open_run(workdir: str, config: Config, write: bool = True) -> None:
    """Makes the directory and writes `config.json` into it; for a run that goes on, compares with the one there.

    Of several processes the first writes, and then the others only compare, with `write` False.

    Raises:
      UserError: where the directory cannot be written, or holds a run of another configuration.
    """
    path = os.path.join(workdir, "config.json")
    fields = _flatten(json.loads(json.dumps(dataclasses.asdict(config))))
    try:
        if write:
            os.makedirs(workdir, exist_ok=True)
        elif not os.path.exists(path):
            raise UserError(f"{path} is missing; expected what the first process wrote: put --workdir on a shared disk")
        if os.path.exists(path):
            with open(path) as file:
                defaults = _flatten(json.loads(json.dumps(dataclasses.asdict(Config()))))
                _compare(defaults | _flatten(json.load(file)), fields, workdir)  # a field newer than the run
        if write:
            with open(path + ".partial", "w") as file:
                json.dump(dataclasses.asdict(config), file, indent=2)
            os.replace(path + ".partial", path)
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"cannot use the run's directory {workdir}: {error}; choose another with --workdir") from None


def read_config(workdir: str) -> Config:
    """The configuration of the run in `workdir`.

    Raises:
      UserError: where there is none, or it is not of this version.
    """
    path = os.path.join(workdir, "config.json")
    try:
        with open(path) as file:
            return _build(Config, json.load(file))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{workdir} is not a run's directory: {path}: {error}") from None


def _build(node: Any, tree: dict[str, Any]) -> Any:
    types = {field.name: field.type for field in dataclasses.fields(node)}
    fields = {}
    for name, value in tree.items():
        if dataclasses.is_dataclass(types[name]):
            value = _build(types[name], value)
        fields[name] = _tuples(value)
    return node(**fields)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _compare(old: dict[str, Any], new: dict[str, Any], workdir: str) -> None:
    missing = "absent"
    differences = [
        f"config.{name} is {new.get(name, missing)!r}, was {old.get(name, missing)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, missing) != new.get(name, missing) and name not in MAY_CHANGE
    ]
    if differences:
        raise UserError(
            f"{workdir} holds a run of another configuration ({'; '.join(differences)}); "
            "take its values to go on with it, or another --workdir"
        )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
