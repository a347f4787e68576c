# SPDX-License-Identifier: Apache-2.0
"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what decoders give for an unfinished character
# A character is four bytes at most, so this many tokens without a whole one are not going to
# become one; without the bound each token would decode all of them again.
MAX_UNFINISHED = 64


class Detokenizer:
    """The text of one sequence.

    A token's text depends on those before it (a leading space, a character's first bytes), so each
    piece is the difference of two decodings that start at the same earlier token. `decoded` counts
    the characters of all pieces, whether given out, held back or cut off by a stop string; `place`
    is how many there are before the last token's text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self.decode = decode
        self.stop = tuple(stop)
        self.longest_stop = max(map(len, self.stop), default=0)
        self.stopped = False
        self.decoded = self.place = 0
        self._unfinished = ""  # the text of tokens from `_read` on, the last one's in parts
        self._tokens: list[int] = []
        self._prefix = self._read = 0
        self._held = ""  # decoded, but perhaps the beginning of a stop string

    def add(self, token: int, search: bool = True) -> str:
        """The text that is certain now; sets `stopped` once a stop string is complete.

        Text that came with search=False is given out without being searched.
        """
        self._tokens.append(token)
        return self._release(self._piece(final=False), search)

    def finish(self, search: bool = True) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        text = self._release(self._piece(final=True), search)
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _piece(self, final: bool) -> str:
        before = self.decode(self._tokens[self._prefix : self._read])
        whole = self.decode(self._tokens[self._prefix :])
        piece = whole[len(before) :]
        if not final:
            self.place = self.decoded + _settled(self._unfinished, piece)
        unfinished = whole.endswith(REPLACEMENT) and not final
        if unfinished and len(self._tokens) - self._read < MAX_UNFINISHED:
            self._unfinished = piece
            return ""
        self._unfinished = ""
        self._prefix, self._read = self._read, len(self._tokens)
        # Only the tail is needed again, and a long answer's tokens need not be kept twice.
        self._tokens = self._tokens[self._prefix :]
        self._read -= self._prefix
        self._prefix = 0
        self.decoded += len(piece)
        return piece

    def _release(self, piece: str, search: bool) -> str:
        if not self.stop or not search:
            return piece
        text = self._held + piece
        found = [place for place in (text.find(s) for s in self.stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0
        for length in range(min(len(text), self.longest_stop - 1), 0, -1):
            if any(s.startswith(text[-length:]) for s in self.stop):
                keep = length
                break
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _settled(before: str, after: str) -> int:
    """Characters of the text `before` that a further token, which made it `after`, left alone."""
    if before and before == after:
        return len(before) - 1  # a further part of the last character
    pairs = enumerate(zip(before, after, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(before), len(after)))
