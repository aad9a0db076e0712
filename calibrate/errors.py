"""The one exception that the command line turns into a one-line message and exit code 2."""

import re


class UserError(ValueError):
    """Something a person can mend: one line with the thing, what was expected, what was found and what to do."""

    def __init__(self, message: str):
        super().__init__(re.sub(r"\s*\n\s*", " ", message))
