"""What the commands share: a user's mistake is one line and exit code 2."""

import sys
from collections.abc import Callable

from vgg_jax.errors import UserError


def report_mistakes(name: str, command: Callable[[], int]) -> int:
    """Runs `command` and returns its exit code; a UserError is printed to standard error, and the code is 2."""
    try:
        return command()
    except UserError as error:
        for line in str(error).splitlines():
            print(f"{name}: error: {line}", file=sys.stderr)
        return 2
