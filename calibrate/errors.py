"""The one exception that the command line turns into a one-line message and exit code 2."""


class UserError(ValueError):
    """Something a person can mend: the message names the thing, what was expected, what was found and what to do."""
