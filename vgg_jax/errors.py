"""What a command reports to its user."""


class UserError(ValueError):
    """A mistake of the user's: its message is the line to print (what was found, what was expected, the remedy).

    Commands print it to standard error without a traceback and leave with exit code 2.
    """
