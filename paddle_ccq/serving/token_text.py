# SPDX-License-Identifier: Apache-2.0
"""A token's own bytes and text, also where it is only part of a character."""

from __future__ import annotations

import json
import re
from typing import Any

from ..evaluation.text import Tokenizer

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenText:
    """Bytes of single tokens, from the vocabulary and the tokenizer's kind of decoder.

    Byte-level vocabularies write every byte as one printable character; those of SentencePiece
    write a space as a mark and bytes without a character of their own as `<0x0A>`. For any other
    decoder a token's bytes are those of its decoded text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.fast = tokenizer.fast
        decoders = _parts(json.loads(self.fast.to_str()).get("decoder"))
        self.added = {i: t.content for i, t in self.fast.get_added_tokens_decoder().items()}
        self.byte_level = any(part["type"] == "ByteLevel" for part in decoders)
        self.byte_fallback = any(part["type"] == "ByteFallback" for part in decoders)
        self.marks = [
            (mark, " ") if part["type"] == "Metaspace" else (mark, part["content"])
            for part in decoders
            if (mark := _mark(part))
        ]

    def bytes(self, token: int) -> bytes:
        """The token's bytes; together, those of a text's tokens are the text's."""
        if token in self.added:
            return self.added[token].encode()
        written = self.fast.id_to_token(token)
        if written is None:
            return b""  # a row of the embedding without a token
        if self.byte_level and all(letter in BYTE_OF for letter in written):
            return bytes(BYTE_OF[letter] for letter in written)
        if self.byte_fallback and (found := BYTE.fullmatch(written)):
            return bytes([int(found[1], 16)])
        if self.marks:
            for mark, text in self.marks:
                written = written.replace(mark, text)
            return written.encode()
        return self.fast.decode([token], skip_special_tokens=False).encode()

    def text(self, token: int) -> str:
        """Its bytes as text, special tokens by their names; U+FFFD for part of a character."""
        return self.bytes(token).decode(errors="replace")


def _parts(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [part for inner in decoder["decoders"] for part in _parts(inner)]


def _mark(part: dict[str, Any]) -> str | None:
    """What a decoder of SentencePiece's kind replaces wherever it stands."""
    if part["type"] == "Metaspace":
        return part["replacement"]
    return part["pattern"].get("String") if part["type"] == "Replace" else None


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's: bytes that print stand for themselves, the others for letters from 256 on."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in prints]
    letters = {chr(byte): byte for byte in prints}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF = _byte_level_alphabet()
