# SPDX-License-Identifier: Apache-2.0
"""A data set of a hub as calibration text: fetched once into a file, then used like any other."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CcqError
from ..files import write_whole
from ..texts.documents import TEXT_FIELDS, Chat, document_of

# About four million tokens: calibration takes its windows spread evenly over the text, and more
# documents than this hold no more to choose from for its default of 256k tokens.
CHARACTERS = 16_000_000
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")


def names_data_set(name: str | os.PathLike[str]) -> bool:
    """Whether the text is no file and has the form "owner/name[:config]"."""
    return not Path(name).exists() and _ID.fullmatch(str(name)) is not None


def local_text(name: str | os.PathLike[str], flag: str = "--calibration") -> Path:
    """The file that `name` is, or the file that a data set "owner/name[:config]" was put into.

    The data set's train split is read in order through the `datasets` client until 16 million
    characters are there. Its documents are the column "text" or "content", the chats in "messages"
    or in "src" and "tgt", or the only column of strings. The file lies in the user's cache
    (XDG_CACHE_HOME) and is not fetched again.

    Raises:
        CcqError: if there is neither such a file nor such a data set, or no client.
    """
    if not names_data_set(name):
        if not os.fspath(name).strip():
            raise CcqError(f"{flag}: the name is empty; name a file or a data set")
        return Path(name)  # whoever reads it says what is wrong with it
    cached = cache_folder() / (str(name).replace("/", "--").replace(":", "--") + ".jsonl")
    if cached.is_file():
        return cached
    try:
        import datasets
    except ImportError:
        raise CcqError(
            f"{flag} {name}: no such file; to fetch a data set of this name from the hub:"
            " pip install 'paddle-ccq[datasets]'"
        ) from None
    identifier, _, config = str(name).partition(":")
    try:
        rows = datasets.load_dataset(identifier, config or None, split="train", streaming=True)
        _write(cached, _records(iter(rows), f"{flag} {name}"))
    except (CcqError, KeyboardInterrupt):
        raise
    except Exception as error:  # the client's own, and those of what it stands on
        detail = " ".join(str(error).split())[:200]
        raise CcqError(
            f"{flag} {name}: no such file, and the hub gives no such data set: {detail}"
        ) from None
    return cached


def cache_folder() -> Path:
    """Where fetched data sets are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "paddle_ccq" / "datasets"


def _records(rows: Iterator[dict[str, Any]], what: str) -> Iterator[dict[str, Any]]:
    """Records as documents.document_of reads them; rows that hold nothing are left out."""
    columns, characters = None, 0
    for number, row in enumerate(rows, start=1):
        columns = columns or _columns(row, what)
        record = {name: row[column] for name, column in columns.items() if row.get(column)}
        if not record.keys() & {"text", "messages", "src"}:
            continue
        document = document_of(record, f"{what}: row {number}")
        if document is None:
            continue
        yield record
        if isinstance(document, Chat):
            characters += sum(len(message["content"]) for message in document.messages)
        else:
            characters += len(document)
        if characters >= CHARACTERS:
            return
    if not characters:
        raise CcqError(f"{what}: the data set's train split holds no text")


def _columns(row: dict[str, Any], what: str) -> dict[str, str]:
    """Field of a record -> column of the data set, from its first row."""
    strings = [key for key, value in row.items() if isinstance(value, str)]
    for column in TEXT_FIELDS:
        if column in strings:
            return {"text": column}
    if isinstance(row.get("messages"), list):
        return {"messages": "messages"}
    if row.get("src") and row.get("tgt"):
        return {name: name for name in ("system", "src", "tgt")}
    if len(strings) == 1:
        return {"text": strings[0]}
    raise CcqError(
        f"{what}: which column is the text? none is called text, content or messages, and of"
        f" strings there are {', '.join(strings) or 'none'}; write a .jsonl file of it"
    )


def _write(path: Path, records: Iterator[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(to: Path) -> None:
        with to.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    write_whole(path, write)
