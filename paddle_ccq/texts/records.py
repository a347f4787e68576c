# SPDX-License-Identifier: Apache-2.0
"""The JSON values in a text: one a line, an array of them, or one alone, each with its line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any

from ..errors import CcqError
from .files import JSON, PLAIN, TextFile, read_file

_SPACE = re.compile(r"[ \t\n]*")
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_objects(
    path: str | os.PathLike[str], flag: str = "--text"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """FILE:LINE and object of each record of a .jsonl or .json file, packed or not, or a pipe.

    Raises:
        CcqError: naming file and line, for what is no JSON, no object, or no Unicode text.
    """
    file = read_file(path, flag)
    if file.kind == PLAIN:
        raise CcqError(f"{flag} {file.path}: must hold JSON objects, one a line (.jsonl)")
    for where, value in json_values(file):
        if not isinstance(value, dict):
            raise CcqError(f"{where}: not a JSON object")
        yield where, value


def json_values(file: TextFile) -> Iterator[tuple[str, Any]]:
    """FILE:LINE and value of each record.

    Raises:
        CcqError: naming file and line, for what is no JSON.
    """
    text = file.text
    start = _skip(text, 0)
    if text.startswith("[", start):
        yield from _array(file, start)
    elif file.kind == JSON and _spans_lines(text[start:]):
        value, end = _decode(file, start)
        if text[end:].strip():
            raise CcqError(f"{_where(file, _skip(text, end))}: something follows the JSON object")
        yield _where(file, start), value
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            # Files joined with cat keep their byte order marks.
            line = line.removeprefix("\ufeff")
            if line.strip():
                where = f"{file.path}:{number}"
                yield where, _loads(where, line)


def check_unicode(text: str, where: str) -> str:
    """The text, unless it holds half a surrogate pair, which stands for no character.

    Raises:
        CcqError: naming it.
    """
    found = _SURROGATE.search(text)
    if found:
        raise CcqError(
            f"{where}: half a surrogate pair, \\u{ord(found[0]):04x}, at character"
            f" {found.start() + 1} of the text; it stands for no character: correct or remove it"
        )
    return text


def _spans_lines(text: str) -> bool:
    """Whether the first line is not a whole record, as in an object printed over many lines."""
    try:
        json.loads(text.split("\n", 1)[0])
    except (ValueError, RecursionError):
        return True
    return False


def _array(file: TextFile, start: int) -> Iterator[tuple[str, Any]]:
    text, place = file.text, _skip(file.text, start + 1)
    line, counted = text.count("\n", 0, place) + 1, place
    if text.startswith("]", place):
        place += 1
    else:
        while True:
            line, counted = line + text.count("\n", counted, place), place
            value, end = _decode(file, place)
            yield f"{file.path}:{line}", value
            place = _skip(text, end)
            if text.startswith("]", place):
                place += 1
                break
            if not text.startswith(",", place):
                raise CcqError(
                    f"{_where(file, place)}: not JSON: the array goes on without a comma"
                )
            place = _skip(text, place + 1)
    if text[place:].strip():
        raise CcqError(f"{_where(file, _skip(text, place))}: something follows the JSON array")


def _skip(text: str, place: int) -> int:
    return _SPACE.match(text, place).end()  # type: ignore[union-attr]  # it matches nothing, too


def _decode(file: TextFile, place: int) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(file.text, place)
    except json.JSONDecodeError as error:
        raise CcqError(
            f"{file.path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CcqError(f"{_where(file, place)}: {_too_large(error)}") from None


def _loads(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise CcqError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise CcqError(f"{where}: {_too_large(error)}") from None


def _where(file: TextFile, place: int) -> str:
    return f"{file.path}:{file.text.count(chr(10), 0, place) + 1}"


def _too_large(error: Exception) -> str:
    """What Python does not read though it is JSON; its own words are for programmers."""
    if isinstance(error, RecursionError):
        return "not JSON that can be read: lists or objects are nested too deeply"
    return "not JSON that can be read: a whole number has too many digits"
