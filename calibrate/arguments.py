"""What the project's command lines have in common."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from calibrate.errors import UserError


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """None is no default: something else decides then."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit; ``--a_b`` and ``--a-b`` are the same flag."""

    def __init__(self, **settings):
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **settings)

    def error(self, message: str):
        raise UserError(f"{message}; see --help")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        normal = []
        for argument in argv:
            name, equals, value = argument.partition("=")
            normal.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
        return self.parse_args(normal)
