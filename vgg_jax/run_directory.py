"""The directory of a run: made and checked before the first step, with the run's configuration in it."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

import filelock
import jax

from vgg_jax.config import Config
from vgg_jax.errors import UserError
from vgg_jax.processes import meet
from vgg_jax.reporting import say

CONFIG = "config.json"
LOCK = ".lock"

# What may change when a run goes on: nothing that the steps taken so far depend on.
MAY_CHANGE = {
    "num_epochs",
    "eval_batch_size",
    "flip_eval",
    "shard_head",
    "max_skipped_steps",
    "log_every_steps",
    "eval_every_epochs",
    "checkpoint_every_epochs",
    "data.data_dir",
    "data.num_threads",
}


@contextlib.contextmanager
def open_run(workdir: str, config: Config, allow_changes: bool = False) -> Iterator[None]:
    """Makes the directory, keeps it for this run while within, and writes `config.json` into it.

    Of several processes the first does, and then the others compare.

    Args:
      workdir: the directory; where it holds a run, that goes on.
      config: of the run.
      allow_changes: takes a configuration other than that of the run so far, and says what differs.

    Raises:
      UserError: where the directory cannot be written, is in use by another run, or holds one of another configuration.
    """
    first = jax.process_index() == 0
    with _locked(workdir) if first else contextlib.nullcontext():
        if first:
            _compare(workdir, config, allow_changes)
            _write(workdir, config)
        meet("the run's directory")
        if not first:
            if not os.path.exists(os.path.join(workdir, CONFIG)):
                raise UserError(f"{workdir} has no {CONFIG} of the first process; put --workdir on a shared disk")
            _compare(workdir, config, allow_changes=False)
        yield


def read_config(workdir: str) -> Config:
    """The configuration of the run in `workdir`.

    Raises:
      UserError: where there is none, or it is not of this version.
    """
    path = os.path.join(workdir, CONFIG)
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


@contextlib.contextmanager
def _locked(workdir: str) -> Iterator[None]:
    """Holds the lock of the directory, which the system gives back when a process ends, in whatever way."""
    if "://" in workdir:
        raise UserError(f"--workdir is {workdir}; expected a directory of a file system: mount the bucket")
    try:
        os.makedirs(workdir, exist_ok=True)
        lock = filelock.FileLock(os.path.join(workdir, LOCK), timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"another process trains in {workdir}; wait until it ends, or take another --workdir") from None
    except OSError as error:
        raise _cannot_use(workdir, error) from None
    with lock:
        yield


def _compare(workdir: str, config: Config, allow_changes: bool) -> None:
    try:
        with open(os.path.join(workdir, CONFIG)) as file:
            old = _fields(Config()) | _flatten(json.load(file))  # a field may be newer than the run
    except FileNotFoundError:
        return
    except (OSError, json.JSONDecodeError) as error:
        raise _cannot_use(workdir, error) from None
    new = _fields(config)
    missing = "absent"
    differences = [
        f"config.{name} is {new.get(name, missing)!r}, was {old.get(name, missing)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, missing) != new.get(name, missing) and name not in MAY_CHANGE
    ]
    if differences and not allow_changes:
        raise UserError(
            f"{workdir} holds a run of another configuration ({'; '.join(differences)}); "
            "take its values to go on with it, or --allow_changes, or another --workdir"
        )
    for line in differences:
        say(line)


def _write(workdir: str, config: Config) -> None:
    path = os.path.join(workdir, CONFIG)
    try:
        with open(path + ".partial", "w") as file:
            json.dump(dataclasses.asdict(config), file, indent=2)
        os.replace(path + ".partial", path)
    except OSError as error:
        raise _cannot_use(workdir, error) from None


def _cannot_use(workdir: str, error: Exception) -> UserError:
    return UserError(f"cannot use the run's directory {workdir}: {error}; choose another with --workdir")


def _fields(config: Config) -> dict[str, Any]:
    return _flatten(json.loads(json.dumps(dataclasses.asdict(config))))  # tuples become lists


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
