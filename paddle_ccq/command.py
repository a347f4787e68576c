# SPDX-License-Identifier: Apache-2.0
"""What every command does around its work: arguments, exit code, and names of what it writes."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .errors import CcqError, run_cli, visible


def run_command(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    body: Callable[[argparse.Namespace], int],
) -> int:
    """Parse the arguments and run the command's body on them (errors.run_cli)."""

    def parsed() -> int:
        args = parser.parse_args(argv)
        refuse_empty(parser, args)
        return body(args)

    return run_cli(parsed)


def to_stderr(text: str) -> None:
    """A message to the user, beside the results on standard output."""
    print(visible(text), file=sys.stderr, flush=True)


def no_message(text: str) -> None:
    """In the place of to_stderr, with --quiet."""


def messages(quiet: bool) -> Callable[[str], object]:
    """What takes a command's messages."""
    return no_message if quiet else to_stderr


def shows_progress(quiet: bool) -> bool:
    """Whether a bar goes to standard error: only where a person may be looking at it."""
    return not quiet and sys.stderr.isatty()


def options_of(args: argparse.Namespace, record: type) -> dict[str, Any]:
    """The flags that are fields of a command's record of options."""
    return {f.name: getattr(args, f.name) for f in fields(record) if hasattr(args, f.name)}


def refuse_empty(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """An empty argument is a variable of a script that was not set; it never means a default.

    Raises:
        CcqError: naming the flag.
    """
    for action in parser._actions:
        values: Any = getattr(args, action.dest, None)
        name = action.option_strings[0] if action.option_strings else action.metavar or action.dest
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, str) and not value.strip():
                raise CcqError(f"{name}: is empty; give a value or leave it out")


def output_path(path: str | os.PathLike[str], flag: str = "--output") -> Path:
    """Where something new is to be written, as an absolute path.

    Raises:
        CcqError: for a name that is empty or holds control characters, such as a line's end.
    """
    name = os.fspath(path)
    if not name.strip():
        raise CcqError(f"{flag}: is empty; name what is to be written")
    found = re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", name)
    if found:
        code = found[0].encode("unicode_escape").decode("ascii")
        raise CcqError(f"{flag} {name!r}: the name holds a control character, {code}; use another")
    return Path(os.path.abspath(name))


def refuse_inside(target: Path, folder: Path) -> None:
    """Refuse to write a new folder into the one that is read, wherever links lead.

    Raises:
        CcqError: naming the target.
    """
    place = target.resolve()
    if folder.resolve() in (place, *place.parents):
        raise CcqError(f"--output {target}: lies in the model's own folder; choose another")
