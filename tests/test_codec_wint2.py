# SPDX-License-Identifier: Apache-2.0
"""WINT2: a byte decodes to the wrong weights, scales land on the wrong group, rows change order."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_ccq.codec import formats, row_order, wint2
from paddle_ccq.codec.reference import algorithm_3

ALL_BYTES = np.arange(256, dtype=np.uint8)[:, None]


def pair(code_scale: float, code_zp: float) -> tuple[np.ndarray, np.ndarray]:
    return np.array([code_scale], np.float32), np.array([code_zp], np.float32)


def random_tensors(k: int, n: int, seed: int = 0) -> wint2.Wint2Tensors:
    rng = np.random.default_rng(seed)
    return wint2.Wint2Tensors(
        rng.integers(0, 256, (k // 4, n)).astype(np.uint8),
        rng.integers(0, 256, (k // 128, n)).astype(np.uint8),
        rng.lognormal(-5, 1, n).astype(ml_dtypes.bfloat16),
        rng.integers(100, 123, n).astype(np.float32),
        rng.integers(0, 1400, n).astype(np.float32),
    )


def test_golden_vectors() -> None:
    # Computed by hand from the definition, so that no code of ours stands behind them:
    # q = 0   -> 1168  = 0b000010010010000 -> 000010 010010 010010 010000
    # q = 200 -> 25368 = 0b110001100011000 -> 110001 001100 100011 011000
    # q = 255 -> 32023 = 0b111110100010111 -> 111110 110100 100010 010111
    book = wint2.codebook(121, 1168)
    assert book[0].tolist() == [0b000010 - 32, 0b010010 - 32, 0b010010 - 32, 0b010000 - 32]
    assert book[200].tolist() == [0b110001 - 32, 0b001100 - 32, 0b100011 - 32, 0b011000 - 32]
    assert book[255].tolist() == [0b111110 - 32, 0b110100 - 32, 0b100010 - 32, 0b010111 - 32]


@settings(max_examples=60)
@given(st.integers(1, 127), st.integers(0, 32767))
def test_all_256_bytes_of_integer_pairs(code_scale: int, code_zp: int) -> None:
    codes = wint2.decode_codes(ALL_BYTES, *pair(code_scale, code_zp))[:, 0]
    assert codes.tolist() == [(q * code_scale + code_zp) & 0x7FFF for q in range(256)]


@settings(max_examples=60)
@given(st.integers(0, 127 * 256), st.integers(0, 100 * 256))
def test_pairs_on_a_256th_grid_decode_exactly(scale_256: int, zp_256: int) -> None:
    codes = wint2.decode_codes(ALL_BYTES, *pair(scale_256 / 256, zp_256 / 256))[:, 0]
    exact = [
        (q * Fraction(scale_256, 256) + Fraction(zp_256, 256) + Fraction(1, 2)).__floor__()
        for q in range(256)
    ]
    assert codes.tolist() == [code & 0x7FFF for code in exact]


def test_ties_round_up_and_not_to_even() -> None:
    assert wint2.decode_codes(ALL_BYTES[:3], *pair(1.0, 0.5))[:, 0].tolist() == [1, 2, 3]


def test_an_off_grid_pair_rounds_like_one_fused_multiply_add() -> None:
    # 128.37 and 13.7 are known to decode one byte differently when multiply and add round apart.
    scale, zp = pair(128.37, 13.7)
    offset = Fraction(float(np.float32(zp[0] + np.float32(0.5))))
    for q in range(256):
        fused = np.float32(float(q * Fraction(float(scale[0])) + offset))
        assert wint2.decode_codes(ALL_BYTES[q : q + 1], scale, zp)[0, 0] == int(np.floor(fused))


def test_dequantize_reads_like_algorithm_3() -> None:
    t = random_tensors(256, 5)
    fast = wint2.dequantize(t, runtime="float32").astype(np.float64)
    for column in range(5):
        for group in range(4):
            slow = algorithm_3(
                W_q=t.quant_weight[group * 16 : group * 16 + 16, column].tolist(),
                s_q=int(t.weight_scale[group // 2, column]),
                s_super=float(t.super_scales[column]),
                zp=32,
                s_code=float(t.code_scale[column]),
                zp_code=float(t.code_zp[column]),
                W_shift=(9, 6, 3, 0),
                s_shift=4 if group % 2 == 0 else 0,
                w_mask=0x3F,
                s_mask=0xF,
            )
            # float32 holds state (6 bits) x nibble (4) x bfloat16 (8) exactly.
            np.testing.assert_array_equal(fast[group * 64 : group * 64 + 64, column], slow)


def test_bfloat16_runtime_rounds_scale_then_product() -> None:
    t = random_tensors(128, 3, seed=4)
    bf16 = ml_dtypes.bfloat16
    scale = (
        wint2.unpack_scales(t.weight_scale).astype(np.float32) * t.super_scales.astype(np.float32)
    ).astype(bf16)
    states = wint2.decode_states(t.quant_weight, t.code_scale, t.code_zp)
    expected = states.astype(np.float32) * np.repeat(scale, 64, axis=0).astype(np.float32)
    np.testing.assert_array_equal(wint2.dequantize(t), expected.astype(bf16).astype(np.float32))


def test_even_groups_stand_in_the_high_nibble() -> None:
    scales = np.array([[1], [2], [3], [15]])
    assert wint2.pack_scales(scales).ravel().tolist() == [0x12, 0x3F]
    with pytest.raises(ValueError):
        wint2.pack_scales(scales[:3])
    with pytest.raises(ValueError):
        wint2.pack_scales(scales + 1)


def test_scales_of_all_bytes_round_trip() -> None:
    packed = np.arange(256, dtype=np.uint8).reshape(64, 4)
    np.testing.assert_array_equal(wint2.pack_scales(wint2.unpack_scales(packed)), packed)


def test_code_range_sees_codes_that_leave_15_bits() -> None:
    low, high = wint2.code_range(
        np.array([121, 121, -1], np.float32), np.array([1264, 2000, 100], np.float32)
    )
    assert (low.tolist(), high.tolist()) == ([1264, 2000, -155], [32119, 32855, 100])


@pytest.mark.parametrize("field", list(wint2.Wint2Tensors.__dataclass_fields__))
def test_wrong_dtype_or_shape_is_refused(field: str) -> None:
    t = random_tensors(128, 4)
    arrays = {f: getattr(t, f) for f in wint2.Wint2Tensors.__dataclass_fields__}
    for bad in (arrays[field].astype(np.float64), arrays[field][..., :3]):
        with pytest.raises(ValueError, match=r"must be"):
            wint2.Wint2Tensors(**{**arrays, field: bad})


def test_row_order_is_the_fragment_mapping() -> None:
    # Stored row 16a + 2b + c holds input row 8b + 2a + c.
    stored = row_order.permute_rows(np.arange(128))
    for group in range(2):
        for a in range(4):
            for b in range(8):
                for c in range(2):
                    assert stored[64 * group + 16 * a + 2 * b + c] == 64 * group + 8 * b + 2 * a + c


def test_row_order_round_trips_on_either_axis() -> None:
    w = np.random.default_rng(0).standard_normal((192, 128))
    for axis in (0, 1):
        permuted = row_order.permute_rows(w, axis)
        assert not np.array_equal(permuted, w)
        np.testing.assert_array_equal(row_order.unpermute_rows(permuted, axis), w)
    with pytest.raises(ValueError, match="multiple of 64"):
        row_order.permute_rows(w[:100])


def test_specs_describe_the_tensors_and_the_published_rate() -> None:
    specs = formats.tensor_specs("wint2", 8192, 7168)
    assert specs["quant_weight"] == ((2048, 7168), "U8")
    assert specs["weight_scale"] == ((64, 7168), "U8")
    assert {specs[s][1] for s in ("code_scale", "code_zp")} == {"F32"}
    assert formats.FORMATS["wint2"].bits_per_weight == 2.0625
    # 16 + 32 + 32 bits more for every column of K weights.
    assert formats.stored_bits_per_weight("wint2", 8192, 7168) == 2.0625 + 80 / 8192
