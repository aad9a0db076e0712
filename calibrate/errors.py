"""The one exception that the command line turns into a one-line message and exit code 2."""

import re


class UserError(ValueError):
    """Something a person can mend: one line with the thing, what was expected, what was found and what to do."""

    def __init__(self, message: str):
        super().__init__(re.sub(r"\s*\n\s*", " ", message))


def first_line(error: Exception) -> str:
    """What a library's exception says in its first line, or its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
