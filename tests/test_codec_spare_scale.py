# SPDX-License-Identifier: Apache-2.0
"""2.5 and 2.75 bits: the remainder row or the hidden scale is read from the wrong bits."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_ccq.codec import formats
from paddle_ccq.codec import spare_scale as ss
from paddle_ccq.codec.reference import algorithm_2

FORMATS = [ss.CCQ_2_75, ss.CCQ_2_5]
ids = [f.name for f in FORMATS]


def random_tensors(f: ss.SpareScaleFormat, k: int, n: int, seed: int) -> ss.SpareScaleTensors:
    rng = np.random.default_rng(seed)
    info = np.iinfo(f.storage)
    words = rng.integers(info.min, info.max + 1, (k // 64 * f.words_per_group, n))
    supers = rng.lognormal(-5, 1, n).astype(ml_dtypes.bfloat16)
    return ss.SpareScaleTensors(f, words.astype(f.storage), supers)


def test_table_1() -> None:
    a, b = FORMATS
    assert (a.shifts, a.mask, a.scale_max, a.bits_per_weight) == ((4, 2, 0), 0xF, 0xF, 2.75)
    assert (b.shifts, b.mask, b.scale_max) == ((13, 11, 9, 6, 4, 2, 0), 0x7, 0x1FFF)
    assert (b.bits_per_weight, a.words_per_group, b.words_per_group) == (2.5, 22, 10)


def test_golden_word_of_each_format() -> None:
    # 2.75: 0b1011_0110 is 1011, 1101, 0110; the last byte 0b0101_1001 is weight 0101, scale 1001.
    q = np.full((22, 1), 0b10110110, np.uint8)
    q[-1] = 0b01011001
    states, scales = ss.unpack(ss.SpareScaleTensors(ss.CCQ_2_75, q, np.ones(1, ml_dtypes.bfloat16)))
    assert states[:3, 0].tolist() == [11 - 8, 13 - 8, 6 - 8]
    assert (states[63, 0], scales[0, 0]) == (5 - 8, 9)
    # 2.5: seven states at bits 13, 11, 9 and 6, 4, 2, 0 of 0b1010111_100110110.
    q = np.full((10, 1), 0b1010111_100110110, np.uint16)
    q[-1] = 0b110_1000000000001
    states, scales = ss.unpack(
        ss.SpareScaleTensors(ss.CCQ_2_5, q.view(np.int16), np.ones(1, ml_dtypes.bfloat16))
    )
    expected = [0b101, 0b101, 0b111, 0b100, 0b011, 0b101, 0b110]
    assert (states[:7, 0] + 4).tolist() == expected
    assert (states[63, 0], scales[0, 0]) == (6 - 4, 0b1000000000001)


@pytest.mark.parametrize("f", FORMATS, ids=ids)
def test_every_word_decodes_as_algorithm_2_says(f: ss.SpareScaleFormat) -> None:
    # All 256 (65,536) words in every position of a group that holds full words.
    total = 1 << f.word_bits
    n = -(-total // (f.words_per_group - 1))
    words = np.zeros((f.words_per_group, n), np.int64)
    words[:-1] = (np.arange((f.words_per_group - 1) * n) % total).reshape(f.words_per_group - 1, n)
    words[-1] = np.arange(n) * 7919 % total
    stored = words.astype(f"u{f.storage.itemsize}").view(f.storage)
    t = ss.SpareScaleTensors(f, stored, np.full(n, 0.5, ml_dtypes.bfloat16))
    fast = ss.dequantize(t, runtime="float32")
    for column in range(0, n, 97):
        slow = algorithm_2(
            W_q=words[:, column].tolist(),
            s_super=0.5,
            zp=f.zero_point,
            W_shift=f.shifts,
            w_mask=f.mask,
            s_mask=f.scale_max,
        )
        np.testing.assert_array_equal(fast[:, column], slow)
    # The shift-and-mask of all words at once, so that no word is left out by the stride above.
    first = ((words[:-1, :, None] >> np.array(f.shifts)) & f.mask) - f.zero_point
    states, _ = ss.unpack(t)
    np.testing.assert_array_equal(
        states[:-1].reshape(f.words_per_group - 1, f.rows_per_word, n), first.swapaxes(1, 2)
    )


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_pack_is_the_inverse_of_unpack(
    f: ss.SpareScaleFormat, groups: int, n: int, seed: int
) -> None:
    t = random_tensors(f, groups * 64, n, seed)
    states, scales = ss.unpack(t)
    again = ss.pack(f, states, scales, t.super_scales)
    np.testing.assert_array_equal(again.quant_weight, t.quant_weight)


@pytest.mark.parametrize("f", FORMATS, ids=ids)
def test_pack_refuses_what_the_word_cannot_hold(f: ss.SpareScaleFormat) -> None:
    states, scales = ss.unpack(random_tensors(f, 64, 2, seed=1))
    one = np.ones(2, ml_dtypes.bfloat16)
    with pytest.raises(ValueError, match="local scales"):
        ss.pack(f, states, scales + f.scale_max + 1, one)
    broken = states.copy()
    broken[63] = f.zero_point
    with pytest.raises(ValueError, match="outside the code"):
        ss.pack(f, broken, scales, one)
    broken = np.zeros_like(states)
    broken[0] = 1
    with pytest.raises(ValueError, match="no walk"):
        ss.pack(f, broken, scales, one)


@pytest.mark.parametrize("f", FORMATS, ids=ids)
def test_specs_match_the_tensors(f: ss.SpareScaleFormat) -> None:
    t = random_tensors(f, 128, 3, seed=0)
    specs = formats.tensor_specs(f.name, 128, 3)
    assert specs["quant_weight"][0] == t.quant_weight.shape
    assert formats.SAFETENSORS_DTYPES[specs["quant_weight"][1]] == f.storage
    assert formats.FORMATS[f.name].bits_per_weight == f.bits_per_weight
    back = formats.decode(
        f.name, {"quant_weight": t.quant_weight, "super_scales": t.super_scales}, "bfloat16"
    )
    np.testing.assert_array_equal(back, ss.dequantize(t))


def test_shape_problems_are_told_in_words() -> None:
    assert formats.shape_problem("wint2", 256, 64) is None
    assert "multiple of 128, got 192" in formats.shape_problem("wint2", 192, 64)
    assert "multiple of 8, got 12" in formats.shape_problem("wint2", 256, 12)
    with pytest.raises(ValueError, match="unknown format"):
        formats.get("int3")
