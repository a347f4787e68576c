# SPDX-License-Identifier: Apache-2.0
"""4-bit integers in 32-bit words, as compressed-tensors packs them (pack-quantized).

A word holds eight values of a row, the first one in its lowest four bits; a value v from -8 to 7 is
stored as v + 8. A row is padded to whole words. Zero points are packed in the same way, but along
the output axis.
"""

from __future__ import annotations

import numpy as np

VALUES_PER_WORD = 8
OFFSET = 8


def words(values: int) -> int:
    """Words that so many values take."""
    return -(-values // VALUES_PER_WORD)


def unpack(packed: np.ndarray, width: int) -> np.ndarray:
    """int32 [rows, words] to the values, int8 [rows, width]."""
    stored = np.ascontiguousarray(packed, "<i4").view(np.uint8)
    values = np.empty((len(stored), 2 * stored.shape[1]), np.int8)
    values[:, 0::2] = stored & 0xF
    values[:, 1::2] = stored >> 4
    values -= OFFSET
    return values[:, :width]


def unpack_columns(packed: np.ndarray, height: int) -> np.ndarray:
    """int32 [words, columns] to the values, int8 [height, columns]: zero points."""
    return np.ascontiguousarray(unpack(packed.T, height).T)
