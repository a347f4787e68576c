# SPDX-License-Identifier: Apache-2.0
"""How a command's flags are spelled, what is a number, and how a wrong argument is reported."""

from __future__ import annotations

import argparse
import math
from typing import Any, NoReturn

from .errors import CcqError


def count(text: str) -> int:
    """A whole number from 1 on."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def whole(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def number(text: str) -> float:
    """A number that is neither NaN nor infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


class Parser(argparse.ArgumentParser):
    """A command's parser: flags are never abbreviated, and may be written with underscores."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(prog=f"paddle-ccq {command}", description=description, allow_abbrev=False)

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        """As argparse's; `--max-items` is `--max_items` too, which help and errors don't repeat."""
        action = super().add_argument(*names, **kwargs)
        for name in names:
            if name.startswith("--"):
                self._option_string_actions["--" + name[2:].replace("-", "_")] = action
        return action

    def error(self, message: str) -> NoReturn:
        """One line, as every other error of a command."""
        raise CcqError(f"{message} (`{self.prog} --help` explains the arguments)")
