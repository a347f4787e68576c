# SPDX-License-Identifier: Apache-2.0
"""JSON from files that nobody has checked: bounded in size, and no key twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import CcqError

# The largest of them are indexes of checkpoints and headers of safetensors files.
MAX_BYTES = 100_000_000


def load_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Parse a JSON file from an untrusted source; every failure is a CcqError naming the file."""
    with open(path, "rb") as file:
        text = file.read(max_bytes + 1)
    if len(text) > max_bytes:
        raise CcqError(f"{path}: larger than {max_bytes} bytes; not a checkpoint's JSON file")
    return parse_json(text, path)


def parse_json(text: bytes, path: Path) -> Any:
    """The value of a JSON text in UTF-8; `path` names it in errors.

    Raises:
        CcqError: for text that is no JSON, or in which a key occurs twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise ValueError(f"{twice!r} occurs twice")
        return result

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CcqError(f"{path}: not valid JSON: {error}") from None
