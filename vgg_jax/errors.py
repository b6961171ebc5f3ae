"""The errors of a user, how a command reports them, and the import of optional packages."""

import importlib
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


def report_mistakes(name: str, command: Callable[[], int]) -> int:
    """Run a command and print a UserError to standard error, without a traceback.

    Args:
      name: the command's name, which begins each line printed.
      command: the function to call; it returns an exit code.

    Returns:
      The command's exit code, 2 after a UserError, or 130 after Ctrl-C.
    """
    try:
        return command()
    except UserError as error:
        for line in str(error).splitlines():
            print(f"{name}: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


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
