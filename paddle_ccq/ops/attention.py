# SPDX-License-Identifier: Apache-2.0
"""Attention of several sequences over keys and values that lie in one cache.

Sums run in the order of dimensions and of positions, and the exponential is the same sequence of
operations on every processor: a query's result depends neither on the other sequences nor on how
its prompt was cut into pieces, nor on threads or instruction set.
"""

from __future__ import annotations

import numpy as np

from ..compiled import core as _core
from . import checks

# Keys of so many places lie side by side; a sequence's places begin at a multiple of it.
PLACES = 16


def padded(dim: int) -> int:
    """Floats of one cached value."""
    return -(-dim // PLACES) * PLACES


def attend(
    qkv: np.ndarray,
    rotation: tuple[np.ndarray, np.ndarray],
    pieces: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    heads: int,
    threads: int | None = None,
    isa: str = "auto",
) -> np.ndarray:
    """Put new tokens into the cache and let them attend: float32 [tokens, heads * dim].

    Args:
        qkv: float32 [tokens, (heads + 2 * key heads) * dim], not rotated yet.
        rotation: cosines and sines, float32 [tokens, dim / 2], of the tokens' positions; a head's
            neighbouring pairs (2i, 2i + 1) are rotated.
        pieces: int64 [pieces, 3]: tokens (one piece behind the other in qkv), the first one's
            position in its sequence, and where the sequence's places begin.
        keys: float32 [key heads, places / 16, dim, 16], written here.
        values: float32 [key heads, places, padded(dim)], written here.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    return _core.attend(qkv, *rotation, pieces, keys, values, heads, checks.threads(threads), isa)
