# SPDX-License-Identifier: Apache-2.0
"""2.5 and 2.75 bits per weight: codes whose last word carries the group's scale in its spare bits.

Paper sections 3.2 and 3.4, Algorithm 2, Table 1. A group of 64 rows is a fixed number of words;
64 leaves a remainder of one row, which stands at the top of the last word, and the bits below it,
which padding rows would have used, hold the group's unsigned local scale instead.

    2.75   (4, 3, 2)              22 bytes a group          4-bit scale
    2.5    (3, 3, 2) + (3, 4, 2)  10 16-bit words a group   13-bit scale
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .convolution import GROUP, ConvolutionalCode
from .floats import BFLOAT16, round_to


@dataclass(frozen=True)
class SpareScaleFormat:
    """One such format: the codes that share a word (first code in the top bits) and its storage.

    storage is the type on disk; 16-bit words are stored signed because neither Paddle nor
    FastDeploy has an unsigned 16-bit tensor, and read back as the same bits.
    """

    name: str
    codes: tuple[ConvolutionalCode, ...]
    storage: np.dtype

    @property
    def word_bits(self) -> int:
        """Bits of a stored word: T of all codes that share it."""
        return sum(code.T for code in self.codes)

    @property
    def shifts(self) -> tuple[int, ...]:
        """Right shift of every state of a word, first row first; Table 1's weight bit-shift."""
        shifts, below = [], self.word_bits
        for code in self.codes:
            below -= code.T
            shifts += [below + shift for shift in code.shifts]
        return tuple(shifts)

    @property
    def mask(self) -> int:
        """Mask of one state after its shift; all codes of a format have states of the same size."""
        return self.codes[0].mask

    @property
    def zero_point(self) -> int:
        """What is subtracted from an unsigned state to make it signed; the same for all codes."""
        return self.codes[0].zero_point

    @property
    def rows_per_word(self) -> int:
        """Rows of a column in a word that is full; the group's last word holds one."""
        return len(self.shifts)

    @property
    def words_per_group(self) -> int:
        """Words that 64 rows of a column take, the one with the local scale included."""
        return -(-GROUP // self.rows_per_word)

    @property
    def scale_bits(self) -> int:
        """Spare bits of the last word: all bits below its single weight."""
        return self.shifts[0]

    @property
    def scale_max(self) -> int:
        """Largest local scale, and Table 1's scale mask."""
        return (1 << self.scale_bits) - 1

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, local scales included and super scales, one a column, not."""
        return self.word_bits * self.words_per_group / GROUP


CCQ_2_75 = SpareScaleFormat("ccq-2.75", (ConvolutionalCode(4, 3, 2),), np.dtype(np.uint8))
CCQ_2_5 = SpareScaleFormat(
    "ccq-2.5", (ConvolutionalCode(3, 3, 2), ConvolutionalCode(3, 4, 2)), np.dtype(np.int16)
)


@dataclass(frozen=True)
class SpareScaleTensors:
    """The two stored tensors of one [K, N] matrix.

    quant_weight [K/64 * words_per_group, N] in the format's storage type; super_scales bf16 [N].
    """

    format: SpareScaleFormat
    quant_weight: np.ndarray
    super_scales: np.ndarray

    def __post_init__(self) -> None:
        f, q, s = self.format, self.quant_weight, self.super_scales
        if q.ndim != 2 or q.dtype != f.storage or q.shape[0] % f.words_per_group:
            raise ValueError(
                f"{f.name} quant_weight must be {f.storage}[K/64 * {f.words_per_group}, N], "
                f"got {q.dtype}{q.shape}"
            )
        if s.shape != (q.shape[1],) or s.dtype != BFLOAT16:
            raise ValueError(f"super_scales must be bfloat16[{q.shape[1]}], got {s.dtype}{s.shape}")

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N) of the matrix."""
        return self.quant_weight.shape[0] // self.format.words_per_group * GROUP, (
            self.quant_weight.shape[1]
        )


def _words(t: SpareScaleTensors) -> np.ndarray:
    """Unsigned words, int32 [K/64, words_per_group, N]."""
    f = t.format
    unsigned = t.quant_weight.view(np.dtype(f"uint{f.storage.itemsize * 8}")).astype(np.int32)
    return unsigned.reshape(-1, f.words_per_group, t.quant_weight.shape[1])


def unpack(t: SpareScaleTensors) -> tuple[np.ndarray, np.ndarray]:
    """Signed states int8 [K, N] and local scales int32 [K/64, N]."""
    f, words = t.format, _words(t)
    shifts = np.array(f.shifts, dtype=np.int32)[None, None, :, None]
    states = ((words[:, :, None, :] >> shifts) & f.mask) - f.zero_point
    groups, _, _, n = states.shape
    # Of the padded rows only the first of the last word is a weight; the rest are the scale's bits.
    states = states.reshape(groups, -1, n)[:, :GROUP].astype(np.int8)
    return states.reshape(groups * GROUP, n), words[:, -1] & f.scale_max


def pack(
    f: SpareScaleFormat, states: np.ndarray, scales: np.ndarray, super_scales: np.ndarray
) -> SpareScaleTensors:
    """Inverse of unpack: int [K, N] signed states, int [K/64, N] local scales, bf16 [N].

    Raises:
        ValueError: if states are no walk of the format's codes or a scale exceeds scale_max.
    """
    k, n = states.shape
    if k % GROUP or scales.shape != (k // GROUP, n):
        raise ValueError(f"{f.name}: states {states.shape} need scales [K/64, N], 64 | K")
    if np.any(scales < 0) or np.any(scales > f.scale_max):
        raise ValueError(f"{f.name}: local scales must lie in 0..{f.scale_max}")
    groups = k // GROUP
    unsigned = states.reshape(groups, GROUP, n).astype(np.int32) + f.zero_point
    full = unsigned[:, :-1].reshape(groups, f.words_per_group - 1, f.rows_per_word, n)
    words = np.zeros((groups, f.words_per_group, n), dtype=np.int32)
    row, below = 0, f.word_bits
    for code in f.codes:
        below -= code.T
        part = np.moveaxis(full[:, :, row : row + code.N], 2, -1)
        words[:, :-1] |= code.encode(part) << below
        row += code.N
    words[:, -1] = (unsigned[:, -1] << f.scale_bits) | scales
    if np.any(unsigned[:, -1] < 0) or np.any(unsigned[:, -1] > f.mask):
        raise ValueError(f"{f.name}: a state lies outside the code")
    stored = words.astype(np.dtype(f"uint{f.storage.itemsize * 8}")).view(f.storage)
    return SpareScaleTensors(f, stored.reshape(-1, n), super_scales)


def dequantize(t: SpareScaleTensors, runtime: str = "bfloat16") -> np.ndarray:
    """float32 [K, N]: state * local scale * super scale, exact in float32, rounded once.

    One rounding at the end is what FastDeploy's unzip op does with its 2.5-bit words.
    """
    states, scales = unpack(t)
    k, n = t.shape
    scales = scales.astype(np.float32) * t.super_scales.astype(np.float32)
    weights = states.reshape(k // GROUP, GROUP, n).astype(np.float32) * scales[:, None, :]
    return round_to(weights, runtime).reshape(k, n)
