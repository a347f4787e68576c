# SPDX-License-Identifier: Apache-2.0
"""Convolutional codes: wrong bit order, wrong code book, states that no word can hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddle_ccq.codec.convolution import ConvolutionalCode, bits_per_weight


@st.composite
def codes(draw: st.DrawFn) -> ConvolutionalCode:
    state_bits = draw(st.integers(1, 6))
    shift = draw(st.integers(1, state_bits))
    return ConvolutionalCode(state_bits, draw(st.integers(1, (16 - state_bits) // shift)), shift)


def test_the_papers_figure_1_walk() -> None:
    # (L=2, N=3, S=1): 00 -> 01 -> 10 is stored as 0010, index 2 of the code book.
    code = ConvolutionalCode(2, 3, 1)
    assert code.T == 4
    assert code.encode(np.array([0b00, 0b01, 0b10])) == 0b0010
    assert code.codebook()[2].tolist() == [0b00, 0b01, 0b10]


@pytest.mark.parametrize(
    "lns,bits,shifts",
    [
        ((4, 3, 2), 8, (4, 2, 0)),
        ((6, 4, 3), 15, (9, 6, 3, 0)),
        ((3, 3, 2), 7, (4, 2, 0)),
        ((3, 4, 2), 9, (6, 4, 2, 0)),
    ],
)
def test_table_1_shifts(lns: tuple[int, int, int], bits: int, shifts: tuple[int, ...]) -> None:
    code = ConvolutionalCode(*lns)
    assert (code.T, code.shifts) == (bits, shifts)


@given(codes())
def test_every_word_decodes_to_a_walk_and_back(code: ConvolutionalCode) -> None:
    book = code.codebook()
    assert book.shape == (2**code.T, code.N)
    np.testing.assert_array_equal(code.encode(book), np.arange(2**code.T))
    # A walk: the low L-S bits of a state are the high L-S bits of the next.
    overlap = code.L - code.S
    low = book[:, :-1] & ((1 << overlap) - 1)
    np.testing.assert_array_equal(low, book[:, 1:] >> code.S)


def test_states_that_are_no_walk_are_refused() -> None:
    code = ConvolutionalCode(4, 3, 2)
    with pytest.raises(ValueError, match="no walk"):
        code.encode(np.array([0b0011, 0b0000, 0b0000]))
    with pytest.raises(ValueError, match="no walk"):
        code.encode(np.array([16, 0, 0]))
    with pytest.raises(ValueError, match="expected 3 states"):
        code.encode(np.array([1, 2]))


@pytest.mark.parametrize("lns", [(0, 1, 1), (3, 2, 4), (3, 2, 0), (3, 0, 1), (20, 3, 6)])
def test_impossible_triplets_are_refused(lns: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError):
        ConvolutionalCode(*lns)


def test_equation_5_gives_the_papers_rates() -> None:
    assert bits_per_weight(8, 3, 64, scale_bits=4) == 2.75
    assert bits_per_weight(16, 7, 64, scale_bits=13) == 2.5
    assert bits_per_weight(8, 4, 64, scale_bits=4) == 2.0625
    # Without a remainder there are no spare bits: section 3.1's 2.66 and 3.2's 2.28.
    assert bits_per_weight(8, 3, 63, scale_bits=0) == pytest.approx(8 / 3)
    assert bits_per_weight(16, 7, 63, scale_bits=0) == pytest.approx(16 / 7)


def test_the_last_word_of_a_group_may_be_partly_filled() -> None:
    assert ConvolutionalCode(4, 3, 2).words_per_group(64) == 22
