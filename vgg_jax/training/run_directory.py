"""The directory of a run: locked and checked before the first step, written only after all checks."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import filelock
import jax

from vgg_jax.config import DTYPES, Config, dtype_for, type_problems
from vgg_jax.console import log
from vgg_jax.errors import UserError
from vgg_jax.training.agreement import meet
from vgg_jax.training.class_names import check_same_classes, saved_class_names
from vgg_jax.training.field_checks import value_problems
from vgg_jax.training.processes import undone_at_an_abrupt_end

CONFIG = "config.json"
HUGGING_FACE = ("model.safetensors", "pytorch_model.bin")
LOCK = ".lock"

# Fields that a resumed run may change: no step taken so far depends on them.
MAY_CHANGE = {
    "num_epochs",
    "eval_batch_size",
    "flip_eval",
    "shard_head",
    "max_skipped_steps",
    "log_every_steps",
    "eval_every_epochs",
    "checkpoint_every_epochs",
    "steps_per_dispatch",
    "profile",
    "peak_tflops",
    "per_class_accuracy",
    "early_stopping_patience",
    "early_stopping_min_delta",
    "cache_features",  # the features are those that the layers would compute
    "features_dir",
    "data.class_names",  # `check_same_classes` compares them
    "data.data_dir",
    "data.num_threads",
}


def resolve_dtype(config: Config, workdir: str | None = None) -> Config:
    """Return the configuration with a dtype in place of `auto`, and print the choice.

    Args:
      config: the configuration of a run.
      workdir: the directory of the run. If it holds a run, the dtype of that run is kept on any platform.

    Raises:
      UserError: if the directory cannot be read.
    """
    platform = jax.default_backend()
    if config.model.dtype == "bfloat16" and platform == "cpu":
        log("model.dtype=bfloat16 is slow on a CPU: use auto or float32")
    if config.model.dtype != "auto":
        return config
    stored = _read_fields(workdir) if workdir else None
    dtype, reason = dtype_for(platform), f"chosen for {platform}"
    if stored and stored["model.dtype"] in set(DTYPES) - {"auto"}:
        dtype, reason = stored["model.dtype"], f"from {CONFIG}"
    log(f"dtype {dtype} ({reason})")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))


def keep_num_classes(config: Config, workdir: str) -> Config:
    """Return the configuration with the number of classes of the run in `workdir`, if that run has no class names.

    Runs of older versions have no class names, and may have more outputs than their data have classes.

    Args:
      config: the configuration of a run, whose `model.num_classes` may be 0.
      workdir: the directory of the run.

    Raises:
      UserError: if the directory cannot be read.
    """
    stored = _read_fields(workdir)
    if config.model.num_classes or not stored or stored["data.class_names"]:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=stored["model.num_classes"]))


@contextlib.contextmanager
def open_run(workdir: str, config: Config, allow_changes: bool = False) -> Iterator[Callable[[], None]]:
    """Lock the run's directory, compare the configuration, and yield the function that writes `config.json`.

    The caller calls that function after its own checks. Without the call, the directory stays as it was, and a new one
    is removed. All processes of a run call it: the first writes, then the others compare.

    Args:
      workdir: the directory, which may hold a run to resume.
      config: the configuration of the run.
      allow_changes: accept a configuration that differs from that of the run so far, and print the differences.

    Raises:
      UserError: if the directory cannot be written, is in use, or holds a run with another configuration.
    """
    first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        made: list[str] = []
        if first:
            made = stack.enter_context(_locked(workdir))
            _compare(workdir, config, allow_changes)
        meet()
        if not first and not os.path.exists(os.path.join(workdir, LOCK)):
            raise UserError(f"{workdir} has no {LOCK} from the first process; put --workdir on a shared disk")
        meet()

        def write() -> None:
            if first:
                _write(workdir, config)
                made.clear()
            meet()
            if not first:
                if not os.path.exists(os.path.join(workdir, CONFIG)):
                    raise UserError(f"{workdir} has no {CONFIG} from the first process; put --workdir on a shared disk")
                _compare(workdir, config, allow_changes=False)

        yield write


def weight_files(path: str) -> list[str]:
    """Return the names of the files in a directory without checkpoints that Hugging Face's libraries call weights."""
    if os.path.exists(os.path.join(path, "checkpoints")):
        return []
    return [name for name in HUGGING_FACE if os.path.isfile(os.path.join(path, name))]


def read_config(workdir: str) -> Config:
    """Return the configuration of the run in `workdir`.

    Raises:
      UserError: if there is none, or another version of vgg_jax wrote it.
    """
    path = os.path.join(workdir, CONFIG)
    if others := weight_files(workdir):
        raise UserError(
            f"{workdir} is not the directory of a run: it holds the weights {', '.join(others)}; expected a run or a "
            f"file: pass {os.path.join(workdir, others[0])}"
        )
    try:
        with open(path) as file:
            config: Config = _build(Config, json.load(file))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{workdir} is not the directory of a run: {path}: {error}") from None
    if problems := type_problems(config) or value_problems(config):
        raise UserError(f"{workdir} is not the directory of a run: {path}: {problems[0]}; restore the file")
    return config


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
def _locked(workdir: str) -> Iterator[list[str]]:
    """Hold the lock of the directory; the system releases it however the process ends.

    Yield the paths that were made for the lock, outermost first. Those still in the list at the end are removed.
    """
    if "://" in workdir:
        raise UserError(f"--workdir is {workdir}; expected a directory of a file system; mount the bucket")
    path = os.path.join(os.path.abspath(workdir), LOCK)
    made: list[str] = []
    while not os.path.lexists(path):
        made.insert(0, path)
        path = os.path.dirname(path)
    lock = filelock.FileLock(os.path.join(workdir, LOCK), timeout=0)
    with contextlib.ExitStack() as stack:
        stack.callback(lock.release)
        stack.enter_context(undone_at_an_abrupt_end(lambda: _remove(made)))
        stack.callback(_remove, made)  # runs before the release, so that no process locks a file about to be removed
        try:
            os.makedirs(workdir, exist_ok=True)
            lock.acquire()
        except filelock.Timeout:
            made.clear()  # another process holds it
            raise UserError(
                f"another process is training in {workdir}; wait until it ends, or choose another --workdir"
            ) from None
        except OSError as error:
            raise _cannot_use(workdir, error) from None
        yield made


def _remove(made: list[str]) -> None:
    """Remove a lock file and the directories made for it, except directories that hold other files."""
    for path in reversed(made):
        with contextlib.suppress(OSError):
            os.rmdir(path) if os.path.isdir(path) else os.remove(path)


def _read_fields(workdir: str) -> dict[str, Any] | None:
    """Return the fields of the run in `workdir` by name, None if there is no run."""
    try:
        with open(os.path.join(workdir, CONFIG)) as file:
            return flat_fields(Config()) | _flatten(json.load(file))  # a field may be newer than the run
    except FileNotFoundError:
        return None
    except (OSError, json.JSONDecodeError) as error:
        raise _cannot_use(workdir, error) from None


def _compare(workdir: str, config: Config, allow_changes: bool) -> None:
    old, new = _read_fields(workdir), flat_fields(config)
    names = (old or {}).get("data.class_names") or saved_class_names(os.path.join(workdir, "checkpoints"))
    check_same_classes(workdir, names, config.data.class_names)
    if old is None:
        return
    missing = "missing"
    differences = [
        f"config.{name} is {new.get(name, missing)!r}, was {old.get(name, missing)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, missing) != new.get(name, missing) and name not in MAY_CHANGE
    ]
    if differences and not allow_changes:
        raise UserError(
            f"{workdir} holds a run with another configuration ({'; '.join(differences)}); "
            "use its values to resume it, add --allow_changes, or choose another --workdir"
        )
    for line in differences:
        log(line)


def _write(workdir: str, config: Config) -> None:
    """Write `config.json`, even if unchanged: so a full disk is found before anything else changes."""
    path = os.path.join(workdir, CONFIG)
    try:
        with open(path + ".partial", "w") as file:
            json.dump(dataclasses.asdict(config), file, indent=2)
        os.replace(path + ".partial", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(path + ".partial")
        raise _cannot_use(workdir, error) from None


def _cannot_use(workdir: str, error: Exception) -> UserError:
    return UserError(f"cannot use the run's directory {workdir}: {error}; choose another with --workdir")


def flat_fields(config: Config) -> dict[str, Any]:
    """Return the fields of a configuration as JSON values, by name such as model.depth."""
    return _flatten(json.loads(json.dumps(dataclasses.asdict(config))))  # tuples become lists


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
