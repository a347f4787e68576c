# SPDX-License-Identifier: Apache-2.0
"""Keys and values of all running sequences: one arena, given out in contiguous regions.

A sequence reserves room for its prompt and all it may generate before it starts, so that a running
one never waits for memory and nothing is ever evicted. Contiguous regions, because attention then
multiplies the cache where it lies, without gathering blocks.
"""

from __future__ import annotations

import bisect
import math
import mmap
from dataclasses import dataclass

import numpy as np

from ..ops.attention import PLACES, padded


@dataclass(frozen=True)
class Region:
    """Token places start..start+length of the arena; both are multiples of PLACES."""

    start: int
    length: int


class KVCache:
    """Room for `tokens` tokens of `layers` layers; pages are touched only as they are used."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, tokens: int) -> None:
        tokens = _rounded(tokens)
        # As ops.attention takes them.
        self.keys = _untouched((layers, kv_heads, tokens // PLACES, head_dim, PLACES))
        self.values = _untouched((layers, kv_heads, tokens, padded(head_dim)))
        self.tokens = tokens
        self.used = 0
        self._free = [(0, tokens)]  # start, length; sorted, never adjacent

    @property
    def nbytes(self) -> int:
        """Bytes of the whole arena; what has not been written takes no memory."""
        return self.keys.nbytes + self.values.nbytes

    def allocate(self, length: int) -> Region | None:
        """A region of at least that length, or None while no free one is long enough."""
        length = _rounded(length)
        for index, (start, free) in enumerate(self._free):
            if free >= length:
                rest = [(start + length, free - length)] if free > length else []
                self._free[index : index + 1] = rest
                self.used += length
                return Region(start, length)
        return None

    def release(self, region: Region) -> None:
        """Give a region back; it joins its free neighbours."""
        start, length = region.start, region.length
        index = bisect.bisect(self._free, (start, 0))
        if index < len(self._free) and self._free[index][0] == start + length:
            length += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == start:
            before = self._free.pop(index - 1)
            start, length, index = before[0], length + before[1], index - 1
        self._free.insert(index, (start, length))
        self.used -= region.length

    def copy(self, source: Region, target: Region, tokens: int) -> None:
        """Give the target what the source has of its first tokens, in all layers."""
        tiles = _rounded(tokens) // PLACES
        a, b = source.start // PLACES, target.start // PLACES
        # What comes along in the last tile is overwritten before any query sees it.
        self.keys[:, :, b : b + tiles] = self.keys[:, :, a : a + tiles]
        a, b = source.start, target.start
        self.values[:, :, b : b + tokens] = self.values[:, :, a : a + tokens]


def _untouched(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros that take memory only where they are written.

    Mapped here, because NumPy asks for huge pages: a few tokens in each of the arena's many rows
    would then take all of it.
    """
    return np.frombuffer(mmap.mmap(-1, 4 * math.prod(shape)), np.float32).reshape(shape)


def _rounded(tokens: int) -> int:
    return -(-tokens // PLACES) * PLACES


def bytes_per_token(layers: int, kv_heads: int, head_dim: int) -> int:
    """Bytes of a token's float32 keys and values, in all layers; of values with their padding."""
    return 4 * layers * kv_heads * (head_dim + padded(head_dim))
