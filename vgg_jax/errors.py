"""The errors of a user, how a command reports them, and the import of optional packages."""

import importlib
import os
import re
import sys
from collections.abc import Callable
from types import ModuleType


class UserError(ValueError):
    """A mistake of the user; its message is the line to print: what was found, what was expected, what to do."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none; a long line loses its middle.

    Args:
      error: the error.

    Returns:
      A line of at most about 200 characters.
    """
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else f"{line[:70]} ... {line[-130:]}"


def out_of_memory(error: BaseException) -> str | None:
    """Return what could not be allocated, if an error says that memory is exhausted; None for other errors.

    JAX raises its own RuntimeError with the status RESOURCE_EXHAUSTED, NumPy and Python raise MemoryError.
    """
    text = str(error)
    exhausted = isinstance(error, RuntimeError) and re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory|bad_alloc", text)
    if not exhausted and not isinstance(error, MemoryError):
        return None
    size = re.search(r"allocat\w* ([\d.,]+) ?([KMGTP]iB|bytes)?", text)
    if size is None:
        return "out of memory"
    number, unit = size.groups()
    amount = f"{int(number) / 2**30:.2f} GiB" if number.isdecimal() and unit in (None, "bytes") else f"{number} {unit}"
    return f"out of memory: an allocation of {amount} failed"


def report_mistakes(name: str, command: Callable[[], int], less_memory: str = "free memory") -> int:
    """Run a command and print a UserError, or exhausted memory, to standard error, without a traceback.

    Args:
      name: the command's name, which begins each line printed.
      command: the function to call; it returns an exit code.
      less_memory: what a user can do if memory is exhausted, in the imperative.

    Returns:
      The command's exit code, 2 after a UserError or if memory is exhausted, 130 after Ctrl-C, or 141 if the reader of
      the output has left, as `head` does.
    """
    try:
        code = command()
        sys.stdout.flush()
        return code
    except UserError as error:
        for line in str(error).splitlines():
            print(f"{name}: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except (MemoryError, RuntimeError) as error:
        problem = out_of_memory(error)
        if problem is None:
            raise
        print(f"{name}: error: {problem}; {less_memory}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports the failed flush at exit
        return 141


def require(module: str, extra: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
      module: the module's full name.
      extra: the extra of vgg_jax that installs the package.

    Returns:
      The module.

    Raises:
      UserError: if the package, or a package that it needs, is not installed or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        problem = f"{error.name or module} is not installed"
    except ImportError as error:
        problem = f"{module} cannot be imported ({first_line(error)})"
    raise UserError(f"{problem}: pip install 'vgg_jax[{extra}]'")
