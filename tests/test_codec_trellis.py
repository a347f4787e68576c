# SPDX-License-Identifier: Apache-2.0
"""ccq-2t: a word decodes to other weights, a byte is read with the wrong one before it."""

from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_ccq.codec import trellis

HEADER = Path(__file__).parent.parent / "custom_ops/gpu/common/trellis_code.h"


def slow_word(word: int) -> list[int]:
    """The definition with Python's own integers."""
    values = []
    for multiplier, addend in zip(trellis.MULTIPLIERS, trellis.ADDENDS, strict=True):
        b = ((word * multiplier + addend) % 2**32).to_bytes(4, "little")
        values += [b[0] - b[1], b[2] - b[3]]
    return values


def random_tensors(k: int, n: int, seed: int) -> trellis.TrellisTensors:
    rng = np.random.default_rng(seed)
    return trellis.TrellisTensors(
        rng.integers(0, 256, (k // 4, n)).astype(np.uint8),
        rng.integers(0, 256, (k // 128, n)).astype(np.uint8),
        rng.lognormal(-5, 1, n).astype(ml_dtypes.bfloat16),
    )


def test_every_word_decodes_as_defined() -> None:
    book = trellis.codebook()
    assert book.shape == (256, 256, 4) and book.dtype == np.int16
    expected = np.array([slow_word(word) for word in range(1 << 16)])
    np.testing.assert_array_equal(book.reshape(-1, 4), expected)
    assert np.abs(book).max() <= trellis.LARGEST


def test_the_values_are_spread_like_two_bytes() -> None:
    # A difference of two independent bytes has mean 0 and variance 2 (256^2 - 1) / 12.
    book = trellis.codebook().reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(book.mean(axis=0), 0, atol=0.5)
    np.testing.assert_allclose(book.std(axis=0), np.sqrt((256**2 - 1) / 6), rtol=0.01)
    assert np.abs(np.corrcoef(book.T) - np.eye(4)).max() < 0.02
    # From any byte before, the 256 vectors differ, and all 256 branches spread over the cube.
    for branch in trellis.codebook():
        assert len(np.unique(branch, axis=0)) == 256
        assert np.all(np.abs(branch.astype(float).mean(axis=0)) < 30)


def test_odd_multipliers_and_the_constants_of_the_compiled_code() -> None:
    assert all(m % 2 == 1 and 0 < m < 2**32 for m in trellis.MULTIPLIERS)
    text = HEADER.read_text(encoding="utf-8")
    for name, values in (("Multiplier", trellis.MULTIPLIERS), ("Addend", trellis.ADDENDS)):
        found = re.search(rf"kTrellis{name}\[2\] = \{{(\d+)u, (\d+)u\}}", text)
        assert found and tuple(int(v) for v in found.groups()) == values


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_column_decodes_byte_by_byte(pairs: int, n: int, seed: int) -> None:
    t = random_tensors(pairs * 128, n, seed)
    decoded = trellis.dequantize(t, "float32")
    for column in range(n):
        before = 0
        for i, byte in enumerate(t.quant_weight[:, column].tolist()):
            group = i // 16
            both = int(t.weight_scale[group // 2, column])
            local = both & 15 if group % 2 else both >> 4
            scale = np.float32(local) * np.float32(t.super_scales[column])
            values = np.array(slow_word(before << 8 | byte), np.float32) * scale
            np.testing.assert_array_equal(decoded[4 * i : 4 * i + 4, column], values)
            before = byte


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 63), st.integers(0, 255), st.integers(0, 2**32 - 1))
def test_a_byte_reaches_its_own_rows_and_the_next_ones(at: int, value: int, seed: int) -> None:
    t = random_tensors(256, 3, seed)
    changed = t.quant_weight.copy()
    changed[at, 1] = value
    before, after = trellis.decode_values(t.quant_weight), trellis.decode_values(changed)
    outside = np.ones(before.shape, bool)
    outside[4 * at : 4 * at + 8, 1] = False
    np.testing.assert_array_equal(before[outside], after[outside])


@pytest.mark.parametrize("runtime", ["bfloat16", "float16"])
def test_values_are_rounded_once(runtime: str) -> None:
    t = random_tensors(256, 4, seed=3)
    exact = trellis.dequantize(t, "float32")
    # Eight bits by four by eight: the product is exact in float32.
    values = trellis.decode_values(t.quant_weight).astype(np.float64)
    scales = np.repeat(np.stack([t.weight_scale >> 4, t.weight_scale & 15], 1).reshape(4, 4), 64, 0)
    np.testing.assert_array_equal(exact, values * scales * t.super_scales.astype(np.float64))
    dtype = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[runtime]
    np.testing.assert_array_equal(
        trellis.dequantize(t, runtime), exact.astype(dtype).astype(np.float32)
    )


@pytest.mark.parametrize(
    "field,value",
    [
        ("quant_weight", np.zeros((48, 4), np.uint8)),
        ("quant_weight", np.zeros((64, 4), np.int8)),
        ("weight_scale", np.zeros((4, 4), np.uint8)),
        ("super_scales", np.zeros(4, np.float32)),
        ("super_scales", np.zeros(3, ml_dtypes.bfloat16)),
    ],
)
def test_tensors_of_another_shape_or_type_are_refused(field: str, value: np.ndarray) -> None:
    fields = dict(vars(random_tensors(256, 4, seed=0)), **{field: value})
    with pytest.raises(ValueError, match=f"{field} must be"):
        trellis.TrellisTensors(**fields)
