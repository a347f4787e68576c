# SPDX-License-Identifier: Apache-2.0
"""Convolutional codes (L, N, S): N overlapping states of L bits, each shifted S bits from the last.

Paper section 3.1. A code word has T = L + (N - 1) * S bits. State i occupies bits
[T - L - i*S, T - i*S): the first state stands at the top, and neighbouring states share L - S bits.
Decoding is a shift and a mask; there is no table to store.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Rows of a column that share a local scale, in every format of the paper.
GROUP = 64


@dataclass(frozen=True)
class ConvolutionalCode:
    """The triplet (L, N, S) of the paper: state bits, states per code word, transition bits.

    Raises:
        ValueError: if 1 <= S <= L or N >= 1 does not hold, or T exceeds 24 bits (the code book of
            2**T words would no longer fit in memory).
    """

    L: int
    N: int
    S: int

    def __post_init__(self) -> None:
        if not (1 <= self.S <= self.L and self.N >= 1):
            raise ValueError(f"({self.L}, {self.N}, {self.S}) is no code: need 1 <= S <= L, N >= 1")
        if self.T > 24:
            raise ValueError(f"({self.L}, {self.N}, {self.S}) has {self.T} bits a word; at most 24")

    @property
    def T(self) -> int:
        """Bits of one code word."""
        return self.L + (self.N - 1) * self.S

    @property
    def mask(self) -> int:
        """Mask of one state; the paper's weight mask."""
        return (1 << self.L) - 1

    @property
    def zero_point(self) -> int:
        """The state that stands for zero: half of the state space."""
        return 1 << (self.L - 1)

    @property
    def shifts(self) -> tuple[int, ...]:
        """Right shift of each state, first state first; the paper's weight bit-shift."""
        return tuple((self.N - 1 - i) * self.S for i in range(self.N))

    def decode(self, words: np.ndarray) -> np.ndarray:
        """Unsigned states of code words: integer array [...] -> int32 [..., N]."""
        words = np.asarray(words, dtype=np.int32)
        return (words[..., None] >> np.array(self.shifts, dtype=np.int32)) & self.mask

    def encode(self, states: np.ndarray) -> np.ndarray:
        """Code words of state sequences: int [..., N] -> int32 [...].

        Raises:
            ValueError: if a state is out of range, or two neighbours disagree in their shared bits
                (no path through the state graph produces such a sequence).
        """
        states = np.asarray(states, dtype=np.int32)
        if states.shape[-1] != self.N:
            raise ValueError(f"expected {self.N} states in the last axis, got {states.shape[-1]}")
        words = np.bitwise_or.reduce(states << np.array(self.shifts, dtype=np.int32), axis=-1)
        if np.any((states < 0) | (states > self.mask)) or np.any(self.decode(words) != states):
            raise ValueError("the states are no walk of this code: shared bits disagree")
        return words

    def codebook(self) -> np.ndarray:
        """All decodable vectors: int32 [2**T, N] of unsigned states; row i belongs to word i."""
        return self.decode(np.arange(1 << self.T))

    def words_per_group(self, group_size: int) -> int:
        """Words needed for a group; the last one is padded when N does not divide the size."""
        return -(-group_size // self.N)


def bits_per_weight(word_bits: int, states: int, group_size: int, scale_bits: int) -> float:
    """Equation (5): equivalent bits per weight of a group, super scales not counted.

    word_bits is T, or 8 when the words are code-clustered into bytes. When the group does not
    divide by N the scale lives in the last word's spare bits and costs nothing extra.
    """
    words = -(-group_size // states)
    extra = scale_bits if group_size % states == 0 else 0
    return (word_bits * words + extra) / group_size
