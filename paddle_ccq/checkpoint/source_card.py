# SPDX-License-Identifier: Apache-2.0
"""The source's model card: licence, language and base model, for the card of the output."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

CARD_FILE = "README.md"
MAX_CARD_BYTES = 1 << 20
DEFAULT_PIPELINE = "text-generation"

# As hubs read it: a block between two lines of dashes at the very start.
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)(?:\r?\n)---[ \t]*(?:\r?\n|$)", re.DOTALL)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CODE = re.compile(r"[a-z]{2,3}(-[a-z0-9]+)*|code|multilingual", re.IGNORECASE)
# Ids that hubs write in lower case, and people as they are spoken of: Apache-2.0, MIT.
_LOWER = ("license", "language")
_SLUG = re.compile(r"[a-z0-9][a-z0-9.-]*")


def read_source_card(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What of the source's metadata holds for a quantized copy too, and messages.

    Keys: license, license_name, license_link, language, base_model, pipeline_tag, each only where
    it is of the form that hubs accept. Anything else of the card is about the source alone.
    """
    given, messages = _metadata(folder / CARD_FILE)
    found: dict[str, Any] = {}
    for key, accepted in _ACCEPTED.items():
        value = _values(given.get(key), accepted, key in _LOWER)
        if value is not None:
            found[key] = value
        elif given.get(key) is not None:
            messages.append(f"{CARD_FILE}: {key} is not of the usual form and is left out")
    link = found.get("license_link")
    if link and not urlsplit(link).scheme and not (folder / link).is_file():
        del found["license_link"]
    if "license" not in found and _is_apache(folder):
        found["license"] = "apache-2.0"
    if "license" not in found:
        messages.append(
            f"{folder}: neither {CARD_FILE} nor a LICENSE file states a known licence; add"
            f" `license:` to the output's {CARD_FILE} before you publish it"
        )
    return found, messages


def front_matter(metadata: dict[str, Any]) -> str:
    """Metadata as the YAML block that a model card begins with."""
    text = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1 << 20)
    return f"---\n{text}---"


def _metadata(path: Path) -> tuple[dict[str, Any], list[str]]:
    if not path.is_file() or path.stat().st_size > MAX_CARD_BYTES:
        return {}, []
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    match = _FRONT_MATTER.match(text)
    if match is None:
        return {}, []
    try:
        content = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        return {}, [f"{path}: its metadata is not YAML ({reason}); nothing is carried over"]
    return (content if isinstance(content, dict) else {}), []


def _values(value: object, accepted: Callable[[str], bool], lower: bool) -> str | list[str] | None:
    """A string, or a list of them, if all are accepted, `lower`: in lower case."""
    if isinstance(value, list):
        parts = [_values(part, accepted, lower) for part in value]
        return parts if parts and all(isinstance(part, str) for part in parts) else None
    if value is False:
        value = "no"  # YAML reads the code of Norwegian so
    if isinstance(value, str) and lower:
        value = value.strip().lower()
    return value if isinstance(value, str) and accepted(value) else None


def _is_line(text: str) -> bool:
    return bool(text.strip()) and text.isprintable() and len(text) <= 500


_ACCEPTED: dict[str, Callable[[str], bool]] = {
    "license": lambda text: _SLUG.fullmatch(text) is not None,
    "license_name": _is_line,
    "license_link": _is_line,
    "language": lambda text: _CODE.fullmatch(text) is not None,
    "base_model": lambda text: _HUB_ID.fullmatch(text) is not None,
    "pipeline_tag": lambda text: _SLUG.fullmatch(text) is not None,
}


def _is_apache(folder: Path) -> bool:
    for path in sorted(folder.iterdir()):
        if path.name.lower().startswith(("license", "licence")) and path.is_file():
            with open(path, "rb") as file:
                start = file.read(400)
            return b"Apache License" in start and b"Version 2.0" in start
    return False
