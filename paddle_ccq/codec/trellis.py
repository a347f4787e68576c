# SPDX-License-Identifier: Apache-2.0
"""CCQ-2T, 2.06 bits per weight: a convolutional code over bytes, whose register keeps one byte.

Byte i of a column stands for rows 4i .. 4i+3, as in WINT2, but it is not decoded alone: with the
byte before it (0 for a column's first) it forms a word of 16 bits, and the word's four weights are
differences of bytes of two products,

    word = previous << 8 | byte
    x0   = (word * MULTIPLIERS[0] + ADDENDS[0]) mod 2^32,    x1 likewise
    v    = byte0(x0) - byte1(x0), byte2(x0) - byte3(x0), and the same two of x1

The weight is v times the local scale of its group of 64 rows (4 bits) times the column's super
scale. A weight therefore depends on two bytes only, and any row can be decoded at random; an
encoder chooses among 256 * 256 vectors at every byte. docs/reference/formats.md specifies it.

The products are a hash, whose values look like independent draws from a triangular distribution.
Codes of this kind are from QTIP (Tseng et al. 2024, arXiv 2406.11235), which shifts its register by
two bits for every weight; here it moves by a whole byte for four weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .convolution import GROUP
from .floats import round_to
from .wint2 import ROWS_PER_BYTE, ByteTensors, unpack_scales

NAME = "ccq-2t"
# The same numbers stand in custom_ops/gpu/common/trellis_code.h; tests compare both.
MULTIPLIERS = (2205301807, 2589985801)
ADDENDS = (3398453655, 2169544712)
# Values -LARGEST .. LARGEST.
LARGEST = 255


@dataclass(frozen=True)
class TrellisTensors(ByteTensors):
    """The three stored tensors of one [K, N] matrix.

    quant_weight uint8 [K/4, N], rows in plain order; weight_scale uint8 [K/128, N], groups 2j in
    the high and 2j+1 in the low nibble; super_scales bfloat16 [N].
    """


def decode_words(words: np.ndarray) -> np.ndarray:
    """Four signed values of each word: integers 0..65535 of any shape [...] -> int16 [..., 4]."""
    values = np.empty((*words.shape, ROWS_PER_BYTE), np.int16)
    for j, (multiplier, addend) in enumerate(zip(MULTIPLIERS, ADDENDS, strict=True)):
        x = (words.astype(np.uint64) * np.uint64(multiplier) + np.uint64(addend)).astype(np.uint32)
        byte = [(x >> np.uint32(8 * b) & np.uint32(255)).astype(np.int16) for b in range(4)]
        values[..., 2 * j] = byte[0] - byte[1]
        values[..., 2 * j + 1] = byte[2] - byte[3]
    return values


def codebook() -> np.ndarray:
    """Values of all words: int16 [256, 256, 4], by the byte before and the byte."""
    return decode_words(np.arange(1 << 16)).reshape(256, 256, ROWS_PER_BYTE)


def words_of(q: np.ndarray) -> np.ndarray:
    """The words of columns of bytes: uint8 [K/4, N] -> int32 [K/4, N]."""
    previous = np.zeros(q.shape, np.int32)
    previous[1:] = q[:-1]
    return previous << 8 | q


def decode_values(q: np.ndarray) -> np.ndarray:
    """Signed values of columns of bytes: uint8 [K/4, N] -> int16 [K, N]."""
    values = decode_words(words_of(q))
    return np.ascontiguousarray(values.swapaxes(1, 2)).reshape(-1, q.shape[1])


def dequantize(t: TrellisTensors, runtime: str = "bfloat16") -> np.ndarray:
    """float32 [K, N]: value * (local scale * super scale), exact in float32, rounded once."""
    k, n = t.shape
    scales = unpack_scales(t.weight_scale).astype(np.float32) * t.super_scales.astype(np.float32)
    values = decode_values(t.quant_weight).astype(np.float32).reshape(k // GROUP, GROUP, n)
    return round_to(values * scales[:, None, :], runtime).reshape(k, n)
