"""Train a VGG network.

    vgg-jax train --config NAME|FILE [--workdir DIR] [--config.FIELD=VALUE ...]

NAME is a configuration that vgg_jax ships, such as digits or vgg16. FILE is a Python file with a function get_config().
In a checkout of the repository, `python train.py --config configs/vgg16.py` is the same command.

The directory of the run, by default runs/NAME, gets config.json, metrics.jsonl, TensorBoard events, curves.png and
checkpoints/. The same command resumes from the last checkpoint. SIGINT and SIGTERM save a checkpoint and exit with code
130 and 143. A mistake in the command gives one line and exit code 2.

On several machines, run the command once on each machine, or once for each device: with --distributed if JAX can find
the other processes (Slurm, Open MPI, Kubernetes, Cloud TPU), else with --coordinator HOST:PORT, --num_processes and
--process_id. One process for each GPU then also needs --local_device_ids.
"""

import contextlib
import difflib
import importlib.util
import logging
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax

from vgg_jax.cli.fields import entry, help_text
from vgg_jax.cli.overrides import check_field_name, check_flag, with_dependents
from vgg_jax.cli.paragraphs import wrapped
from vgg_jax.config import Config, type_problems
from vgg_jax.console import note
from vgg_jax.errors import UserError, report_mistakes, require
from vgg_jax.runtime import configure

# What a run needs from the extra `train`. Some modules are imported late: matplotlib at the end of the run.
MODULES = ("absl", "array_record", "grain", "matplotlib", "ml_collections", "tensorboardX", "tensorflow_datasets")
HELP = {"--help", "-h"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; `argv` are the arguments, by default those of train.py."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return report_mistakes("train.py" if argv is None else "vgg-jax train", lambda: _run(arguments))


def _run(argv: list[str]) -> int:
    for module in MODULES:
        if importlib.util.find_spec(module) is None:
            require(module, "train")  # raises UserError
    if HELP & set(argv):
        print(_help(argv))
        return 0
    configure()
    joining = _process_flags(argv)
    # On a CPU, run all programs in this thread: the steps of an evaluation in turn, as those of training.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    ignore_abandoned_writes()
    # TFDS and Orbax log, with tracebacks, the errors that this command reports in one line.
    require("absl.logging", "train").set_verbosity("fatal")
    from vgg_jax.training import loop  # here, because it imports modules of the extra `train`

    with _processes(joining):  # before the rest is parsed: so the others learn of a mistake in one command
        config, flags, notes = _parse(argv)
        for line in notes if jax.process_index() == 0 else ():
            note(line)
        return loop.train_and_evaluate(config, flags.workdir, flags.summary, flags.allow_changes)


def _define_flags(argv: list[str]) -> Any:
    """Return the flags of the command, an `absl.flags.FlagValues` that has parsed nothing yet."""
    flags = require("absl.flags", "train")
    values = flags.FlagValues()
    require("ml_collections.config_flags", "train").DEFINE_config_file(
        "config",
        help_string="name of a shipped configuration, or a Python file with get_config()",
        flag_values=values,
        sys_argv=["train.py", *argv],  # the overrides of fields are found here
    )
    flags.DEFINE_string("workdir", None, "directory of the run; by default runs/NAME", flag_values=values)
    flags.DEFINE_bool("summary", False, "print the table of the network's layers before training", flag_values=values)
    flags.DEFINE_bool(
        "allow_changes", False, "resume with a configuration that differs from that of the run", flag_values=values
    )
    _define_process_flags(values)
    return values


def _define_process_flags(values: Any) -> None:
    """Add the flags that join the processes of a run."""
    flags = require("absl.flags", "train")
    flags.DEFINE_bool(
        "distributed", False, "join the other processes of the run, which JAX finds itself", flag_values=values
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of the first of several processes", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "number of processes", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process_id", None, "index of this process, from 0", lower_bound=0, flag_values=values)
    flags.DEFINE_list(
        "local_device_ids",
        None,
        "GPUs of this machine that this process uses, such as 0 or 0,1; by default all of them",
        flag_values=values,
    )


def _process_flags(argv: list[str]) -> Any:
    """Return the flags that join the processes; every other argument is parsed later.

    Raises:
      UserError: for a wrong value.
    """
    flags = require("absl.flags", "train")
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # else parsing ends at the first value of another flag
    _define_process_flags(values)
    try:
        values(["train.py", *argv], known_only=True)
    except flags.Error as error:
        raise UserError(str(error).splitlines()[0]) from None
    return values


def _help(argv: list[str]) -> str:
    """Return the help text: the flags, and the fields with the values of the configuration on the command line."""
    values = _define_flags([])
    lines = [wrapped(str(__doc__)), "", "Flags:"]
    for name in values:
        default = values[name].default
        lines += entry(f"--{name}" + (f"={default}" if default is not None else ""), values[name].help)
    rest = [argument for argument in argv if argument not in HELP]
    if any(re.match(r"--?config(=|$)", argument) for argument in rest):
        config, source = _parse(rest)[0], "values of this command"
    else:
        config, source = Config(), "defaults; for others, add --config NAME"
    return "\n".join([*lines, "", f"Fields of the configuration ({source}):", "", help_text(config)])


def _parse(argv: list[str]) -> tuple[Config, Any, list[str]]:
    """Return the configuration, the parsed flags of a command line, and one line for each field that follows another.

    Raises:
      UserError: for every mistake in the command line or the values of the configuration.
    """
    _check_names(argv)
    argv, path = _with_config_path(argv)
    values = _define_flags(argv)
    try:
        rest = values(["train.py", *argv])[1:]
        config = values.config
    except require("absl.flags", "train").Error as error:
        first, *others = str(error).splitlines()
        # For an error inside the file the message holds a traceback, whose last line is the error itself.
        raise UserError(f"{path}: {others[-1]}" if others else first) from None
    except Exception as error:  # of any kind, raised by the file
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; expected flags only; see --help")
    if not isinstance(config, Config):
        raise UserError(f"{path}: get_config() returned {type(config).__name__}; expected a vgg_jax.config.Config")
    from vgg_jax.training.validation import check_config  # here, because it imports modules of the extra `train`

    notes: list[str] = []
    given = {name.removeprefix("config."): values[name].default for name in values if name.startswith("config.")}
    if not type_problems(config):
        config, notes = with_dependents(config, given)
    check_config(config)
    values.workdir = values.workdir or os.path.join("runs", pathlib.Path(path).stem)
    return config, values, notes


def _check_names(argv: list[str]) -> None:
    """Raise UserError for a flag or a field that does not exist."""
    values = _define_flags([])
    flags, is_value = [*values, "help", "flagfile", "undefok"], False
    for argument in argv:
        name, equals, _ = argument.lstrip("-").partition("=")
        if is_value or not re.match("--?[A-Za-z]", argument):
            is_value = False
        elif match := re.fullmatch(r"(?:no)?config\.(.*)", name):
            check_field_name(match.group(1))
        else:
            check_flag(argument, flags)
            is_value = not equals and name in values and not values[name].boolean


def _with_config_path(argv: list[str]) -> tuple[list[str], str]:
    """Return the arguments with the path of the configuration in place of its name, and that path."""
    path, arguments, is_value = None, [], False
    for argument in argv:
        if is_value:
            path = argument = find_config(argument)
            is_value = False
        elif match := re.match(r"(--?config)=(.*)", argument):
            path = find_config(match.group(2))
            argument = f"{match.group(1)}={path}"
        else:
            is_value = argument in ("-config", "--config")
        arguments.append(argument)
    if path is None:
        raise UserError(
            f"--config is missing; expected a file, or one of {', '.join(shipped_configs())}; add --config digits"
        )
    return arguments, path


def find_config(name: str) -> str:
    """Return the path of a configuration: `name` if it is a file, else that of the shipped configuration `name`.

    Raises:
      UserError: if there is neither.
    """
    if os.path.isfile(name):
        return name
    shipped = shipped_configs()
    if name not in shipped:
        close = difflib.get_close_matches(pathlib.Path(name).stem.replace("-", "_"), shipped, n=1)
        remedy = f"; did you mean {close[0]}?" if close else ""
        raise UserError(
            f"--config is {name!r}, which is not a file; expected one, as configs/digits.py, or one of "
            f"{', '.join(shipped)}{remedy}"
        )
    return shipped[name]


def shipped_configs() -> dict[str, str]:
    """Return the paths of the shipped configurations by name."""
    package = pathlib.Path(__file__).parents[1]
    folder = package / "configs"
    if not folder.is_dir():
        folder = package.parent / "configs"  # in a checkout
    return {path.stem: str(path) for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")}


def _processes(flags: Any) -> contextlib.AbstractContextManager[None]:
    """Return the context that joins the other processes of the run, if there are any."""
    from vgg_jax.training.processes import check_alone, joined

    if flags.distributed or flags.coordinator:
        return joined(flags.coordinator, flags.num_processes, flags.process_id, _device_ids(flags.local_device_ids))
    given = (flags.num_processes, flags.process_id, flags.local_device_ids)
    if any(value is not None for value in given):
        raise UserError("--coordinator is missing; expected HOST:PORT with --num_processes and --process_id")
    check_alone()
    return contextlib.nullcontext()


def _device_ids(texts: list[str] | None) -> list[int] | None:
    """Return the numbers of a process's devices, or None if they are not given."""
    if texts is None:
        return None
    if not texts or not all(text.isdecimal() for text in texts):
        raise UserError(
            f"--local_device_ids is {','.join(texts)!r}; expected the numbers of GPUs of this machine, such as 0 or 0,1"
        )
    return [int(text) for text in texts]


def ignore_abandoned_writes() -> None:
    """Silence the reports of Python and asyncio about writes that Orbax abandons when a save fails.

    `Checkpoints` raises the failure itself.
    """

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
