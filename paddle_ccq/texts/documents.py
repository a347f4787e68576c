# SPDX-License-Identifier: Apache-2.0
"""The documents of a text: strings, and chats, which a model's template turns into strings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CcqError
from .files import PLAIN, read_file
from .records import check_unicode, json_values

TEXT_FIELDS = ("text", "content")
FIELDS = '"text", "content", "messages", or "src" and "tgt"'


@dataclass(frozen=True)
class Chat:
    """A conversation: messages with "role" and "content", and FILE:LINE for what is wrong."""

    messages: tuple[Mapping[str, Any], ...]
    where: str


Document = str | Chat


@dataclass(frozen=True)
class Texts:
    """The documents of one file or pipe, which was read once; blank ones are left out.

    Attributes:
        label: the file's name, for provenance.
        sha256: of the bytes as they were read.
    """

    label: str
    sha256: str
    documents: tuple[Document, ...]


def read_texts(path: str | os.PathLike[str], flag: str = "--text") -> Texts:
    """Read a .txt file as one document, JSON as one document a record (docs/reference/texts.md).

    Raises:
        CcqError: in one line, with FILE:LINE where there is a line.
        OSError: if the system does not let it be read.
    """
    file = read_file(path, flag)
    if file.kind == PLAIN:
        found: list[Document | None] = [None if is_blank(file.text) else file.text]
    else:
        found = [document_of(value, where) for where, value in json_values(file)]
    documents = tuple(document for document in found if document is not None)
    if not documents:
        raise CcqError(f"{flag} {file.path}: holds no text")
    return Texts(file.label, file.sha256, documents)


def read_documents(path: str | os.PathLike[str], flag: str = "--text") -> list[Document]:
    """The documents alone; see read_texts."""
    return list(read_texts(path, flag).documents)


def is_blank(text: str) -> bool:
    """Whether there is nothing to be seen: white space, control and format characters."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def document_of(record: Any, where: str) -> Document | None:
    """The document that a record holds, None where it is blank.

    A string is a document. Of an object, the first of these fields that is there and not null is
    taken: "text", "content", "messages", "src" with "tgt" (and "system") as in ERNIEKit.

    Raises:
        CcqError: naming `where`, for a record that holds none of them, or a wrong one.
    """
    if isinstance(record, str):
        return None if is_blank(check_unicode(record, where)) else record
    if not isinstance(record, dict):
        raise CcqError(f"{where}: not a JSON object or string")
    for field in TEXT_FIELDS:
        value = record.get(field)
        if value is None:
            continue
        if not isinstance(value, str):
            raise CcqError(f'{where}: field "{field}" is not a string')
        return document_of(value, where)
    if record.get("messages") is not None:
        return _chat(record["messages"], where)
    if record.get("src") is not None or record.get("tgt") is not None:
        return _erniekit(record, where)
    raise CcqError(f"{where}: none of the fields {FIELDS}")


def _chat(messages: Any, where: str) -> Chat | None:
    if not isinstance(messages, list) or not messages:
        raise CcqError(f'{where}: field "messages" is not a list of messages')
    found = []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise CcqError(f'{where}: {name} is no object with a "role"')
        # Templates may print a name, a reasoning or a tool call as well.
        _check_strings(message, where)
        found.append({**message, "content": _content(message, name, where)})
    blank = all(is_blank(m["content"]) and not m.get("tool_calls") for m in found)
    return None if blank else Chat(tuple(found), where)


def _content(message: Mapping[str, Any], name: str, where: str) -> str:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if all(isinstance(part, str) for part in parts):
            return "".join(parts)
        raise CcqError(f"{where}: {name} has a part that is not text")
    raise CcqError(f"{where}: {name} has no text as its content")


def _check_strings(value: Any, where: str) -> None:
    if isinstance(value, str):
        check_unicode(value, where)
    elif isinstance(value, dict):
        for key, inner in value.items():
            check_unicode(key, where)
            _check_strings(inner, where)
    elif isinstance(value, list):
        for inner in value:
            _check_strings(inner, where)


def _erniekit(record: Mapping[str, Any], where: str) -> Chat | None:
    """ERNIEKit's records: what was said and answered, turn by turn, after a system setting."""
    if record.get("is_system"):
        raise CcqError(f'{where}: field "is_system" is not read; name the setting "system"')
    turns = {}
    for field in ("src", "tgt"):
        value = record.get(field)
        turns[field] = [value] if isinstance(value, str) else value
        if not isinstance(turns[field], list) or not all(isinstance(t, str) for t in turns[field]):
            raise CcqError(f'{where}: field "{field}" is not a string or a list of strings')
    src, tgt = turns["src"], turns["tgt"]
    if len(src) != len(tgt) or not src:
        raise CcqError(
            f'{where}: "src" has {len(src)} turns and "tgt" {len(tgt)}; each needs an answer'
        )
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise CcqError(f'{where}: field "system" is not a string')
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for asked, answered in zip(src, tgt, strict=True):
        messages += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answered},
        ]
    return _chat(messages, where)
