"""How a command reports a mistake of its user's."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake of the user's: its message is the line to print (what was found, what was expected, the remedy)."""


def first_line(error: BaseException) -> str:
    """What an error says, in a line of some 200 characters, its begin and its end; its kind where it says nothing."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else f"{line[:70]} ... {line[-130:]}"


def report_mistakes(name: str, command: Callable[[], int]) -> int:
    """Runs `command` and returns its exit code: 2 for a UserError, printed to standard error; 130 for Ctrl-C."""
    try:
        return command()
    except UserError as error:
        for line in str(error).splitlines():
            print(f"{name}: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
