# SPDX-License-Identifier: Apache-2.0
"""CPU ops: wrong products, results that depend on the machine, arguments that slip through."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_ccq import _core, ops
from paddle_ccq.codec import formats, row_order
from paddle_ccq.codec.formats import Tensors

KINDS = ["wint2", "wint2-general", "ccq-2t", "ccq-2.5", "ccq-2.75"]
TOKENS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 64, 65, 130]
# Activations are rounded to 16 bits per 64 rows: 2.3e-5 on Gaussian ones, with room for the few
# rows and columns of these tests.
BOUND = 1e-4


def stored(kind: str, k: int, n: int, seed: int = 0) -> tuple[str, Tensors]:
    """Random bytes: every code, both nibbles, zero scales, negative super scales."""
    rng = np.random.default_rng(seed)
    format = kind.removesuffix("-general")
    tensors = {}
    for suffix, (shape, name) in formats.tensor_specs(format, k, n).items():
        dtype = formats.SAFETENSORS_DTYPES[name]
        if suffix == "super_scales":
            tensors[suffix] = (rng.uniform(0.5, 2, shape) * rng.choice([-1, 1], shape)).astype(
                dtype
            )
        elif suffix == "code_scale":
            general = rng.uniform(90, 125, shape)
            integer = rng.integers(1, 122, shape)
            tensors[suffix] = (integer if kind == format else general).astype(dtype)
        elif suffix == "code_zp":
            general = rng.uniform(-50, 900, shape)
            integer = rng.integers(0, 1800, shape)
            tensors[suffix] = (integer if kind == format else general).astype(dtype)
        else:
            raw = rng.integers(0, 256, int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
            tensors[suffix] = raw.view(dtype).reshape(shape)
    return format, tensors


def error(out: np.ndarray, expected: np.ndarray) -> float:
    assert np.all(np.isfinite(out.astype(np.float64)))
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(out.astype(np.float64) - expected) / (norm or 1.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dequant_is_the_codec_bit_for_bit(kind: str, dtype: str) -> None:
    format, tensors = stored(kind, 256, 48, seed=1)
    # Subnormal and overflowing float16 results must round like NumPy's.
    extreme = np.array([1e-9, 3e-8, 6e-6, 1e3, 3e4, -1e-7, 0.0, 1e30], ml_dtypes.bfloat16)
    tensors["super_scales"][: len(extreme)] = extreme
    expected = formats.decode(format, tensors, dtype)
    found = ops.dequant(format, tensors, dtype, threads=3)
    assert str(found.dtype) == dtype
    np.testing.assert_array_equal(found.astype(np.float32), expected)


def test_every_byte_of_many_pairs_decodes_as_the_codec_says() -> None:
    rng = np.random.default_rng(2)
    n = 512
    tensors = {
        "quant_weight": np.repeat(np.arange(256, dtype=np.uint8)[:, None], n, axis=1),
        "weight_scale": np.full((8, n), 0x11, np.uint8),
        "super_scales": np.ones(n, ml_dtypes.bfloat16),
        "code_scale": np.concatenate([np.full(n // 2, 121.0), rng.uniform(-100, 128, n // 2)]),
        "code_zp": np.concatenate([rng.integers(0, 1913, n // 2), rng.uniform(0, 1500, n // 2)]),
    }
    for name in ("code_scale", "code_zp"):
        tensors[name] = tensors[name].astype(np.float32)
    expected = formats.decode("wint2", tensors, "float32")
    np.testing.assert_array_equal(ops.dequant("wint2", tensors, "float32"), expected)
    # One-hot rows read the products' decoders out, column halves with integer and general pairs.
    for half in (slice(0, n // 2), slice(n // 2, n)):
        part = {s: np.ascontiguousarray(t[..., half]) for s, t in tensors.items()}
        packed = ops.repack("wint2", part)
        assert packed.core.integer == (half.start == 0)
        for isa in _core.matmul_instruction_sets():
            for rows in (np.eye(1024, dtype=np.float32)[:1], np.eye(1024, dtype=np.float32)):
                y = ops.linear(rows, packed, isa=isa)
                np.testing.assert_array_equal(y, expected[: len(rows), half])


@pytest.mark.parametrize("kind", KINDS)
def test_repack_round_trip_is_exact_and_of_the_same_size(kind: str) -> None:
    format, tensors = stored(kind, 384, 80, seed=3)
    packed = ops.repack(format, tensors)
    back = packed.unpack()
    assert list(back) == list(tensors)
    for suffix, value in tensors.items():
        assert back[suffix].dtype == value.dtype
        np.testing.assert_array_equal(back[suffix].view(np.uint8), value.view(np.uint8))
    # Super scales are held as float32: two bytes a column more; ccq-2t's byte before is a third.
    more = 3 if format == "ccq-2t" else 2
    assert packed.nbytes == sum(t.nbytes for t in tensors.values()) + more * 80


@pytest.mark.parametrize("isa", _core.matmul_instruction_sets())
def test_later_rows_of_ccq_2t_with_the_bytes_before_them(isa: str) -> None:
    """A rank's part along K multiplies as the whole does with zeros for all other inputs."""
    _, tensors = stored("ccq-2t", 512, 48, seed=21)
    whole = ops.repack("ccq-2t", tensors)
    x = np.random.default_rng(22).standard_normal((9, 512)).astype(np.float32)
    differs = False
    for first, last in ((0, 128), (128, 384), (384, 512)):
        codes = tensors["quant_weight"]
        part = {
            "quant_weight": np.ascontiguousarray(codes[first // 4 : last // 4]),
            "weight_scale": np.ascontiguousarray(
                tensors["weight_scale"][first // 128 : last // 128]
            ),
            "super_scales": tensors["super_scales"],
        }
        before = codes[first // 4 - 1] if first else None
        packed = ops.repack("ccq-2t", part, before=before)
        np.testing.assert_array_equal(packed.core.before, 0 if before is None else before)
        only = np.zeros_like(x)
        only[:, first:last] = x[:, first:last]
        for m in (1, 9):
            expected = ops.linear(only[:m], whole, isa=isa)
            rows = np.ascontiguousarray(x[:m, first:last])
            np.testing.assert_array_equal(ops.linear(rows, packed, isa=isa), expected)
            differs |= not np.array_equal(
                ops.linear(rows, ops.repack("ccq-2t", part), isa=isa), expected
            )
    assert differs


def test_a_row_order_that_the_format_has_not() -> None:
    format, tensors = stored("ccq-2t", 128, 16)
    with pytest.raises(ValueError, match="row_order: rows of ccq-2t are in plain order, got 'fast"):
        ops.repack(format, tensors, "fastdeploy-2.1")


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_without_columns(kind: str) -> None:
    format, tensors = stored(kind, 128, 16)
    empty = {name: np.ascontiguousarray(part[..., :0]) for name, part in tensors.items()}
    for call in (ops.repack, ops.dequant):
        with pytest.raises(ValueError, match="quant_weight has no columns"):
            call(format, empty)


def test_bytes_before_that_do_not_fit() -> None:
    format, tensors = stored("ccq-2t", 128, 16)
    with pytest.raises(ValueError, match=r"before must be uint8\[16\], got uint8\[15\]"):
        ops.repack(format, tensors, before=np.zeros(15, np.uint8))
    with pytest.raises(ValueError, match=r"before must be uint8\[16\], got int64\[16\]"):
        ops.repack(format, tensors, before=np.zeros(16, np.int64))
    format, tensors = stored("wint2", 128, 16)
    with pytest.raises(ValueError, match="before: wint2 has no byte before the first one"):
        ops.repack(format, tensors, before=np.zeros(16, np.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_linear_equals_float64_and_no_batch_thread_or_instruction_set_matters(kind: str) -> None:
    format, tensors = stored(kind, 640, 112, seed=4)
    packed = ops.repack(format, tensors)
    weight = formats.decode(format, tensors, "float32").astype(np.float64)
    x = np.random.default_rng(5).standard_normal((max(TOKENS), 640)).astype(np.float32)
    x[:, 7] *= 300
    x[:, 400] *= 1e5
    whole = ops.linear(x, packed, threads=1)
    assert error(whole, x.astype(np.float64) @ weight) < BOUND
    for m in TOKENS:
        for isa in _core.matmul_instruction_sets():
            np.testing.assert_array_equal(ops.linear(x[:m], packed, threads=3, isa=isa), whole[:m])


def test_an_outlier_does_not_drown_its_neighbours() -> None:
    format, tensors = stored("wint2", 128, 32, seed=14)
    tensors["weight_scale"][:] = 0x77
    # Byte 0 is code 16384, whose first state is 32: row 4 is zero, and its input is huge.
    tensors["quant_weight"][1] = 0
    tensors["code_scale"][:], tensors["code_zp"][:] = 64, 16384
    weight = formats.decode(format, tensors, "float32").astype(np.float64)
    rows = np.flatnonzero(~weight.any(axis=1))
    assert len(rows)
    x = np.random.default_rng(15).standard_normal((9, 128)).astype(np.float32)
    x[:, rows[0]] = 1e6
    packed = ops.repack(format, tensors)
    for m in (1, 9):
        assert error(ops.linear(x[:m], packed), x[:m].astype(np.float64) @ weight) < BOUND


@pytest.mark.parametrize("kind", KINDS)
def test_fine_products_are_off_by_float32_alone_and_bits_are_the_same_everywhere(kind: str) -> None:
    format, tensors = stored(kind, 640, 48, seed=4)
    weight = formats.decode(format, tensors, "float32").astype(np.float64)
    packed = ops.repack(format, tensors)
    x = np.random.default_rng(5).standard_normal((max(TOKENS), 640)).astype(np.float32)
    x[3:40, 64:128] = 0  # groups without a rest among others with one
    x[::7, 5] = 1e4
    whole = ops.linear(x, packed, threads=1, fine=True)
    exact = x.astype(np.float64) @ weight
    assert max(error(row, wanted) for row, wanted in zip(whole, exact, strict=True)) < 1e-6
    assert error(ops.linear(x[1:2], packed), exact[1:2]) > 1e-5
    for isa in _core.matmul_instruction_sets():
        for m in TOKENS:
            found = ops.linear(x[-m:], packed, threads=3, isa=isa, fine=True)
            assert np.array_equal(found, whole[-m:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_activations_lose_only_the_output_rounding(kind: str, dtype: type) -> None:
    format, tensors = stored(kind, 256, 64, seed=6)
    tensors["super_scales"] = (tensors["super_scales"].astype(np.float32) * 1e-3).astype(
        ml_dtypes.bfloat16
    )
    x = np.random.default_rng(7).standard_normal((5, 256)).astype(dtype)
    y = ops.linear(x, ops.repack(format, tensors))
    assert y.dtype == dtype
    weight = formats.decode(format, tensors, "float32").astype(np.float64)
    assert error(y, x.astype(np.float64) @ weight) < 2.5e-3


def test_permuted_rows_multiply_the_right_inputs() -> None:
    _, plain = stored("wint2", 256, 32, seed=8)
    weight = formats.decode("wint2", plain, "float32").astype(np.float64)
    weight = row_order.unpermute_rows(weight)
    x = np.random.default_rng(9).standard_normal((3, 256)).astype(np.float32)
    y = ops.linear(x, ops.repack("wint2", plain, row_order.FASTDEPLOY_2_1))
    assert error(y, x.astype(np.float64) @ weight) < BOUND


def test_zeros_tiny_and_huge_rows_and_nan_stay_what_they_are() -> None:
    format, tensors = stored("wint2", 128, 16, seed=10)
    weight = formats.decode(format, tensors, "float32").astype(np.float64)
    packed = ops.repack(format, tensors)
    x = np.random.default_rng(11).standard_normal((4, 128)).astype(np.float32)
    x[0], x[1], x[2] = 0, x[1] * np.float32(1e-20), x[2] * np.float32(1e30)
    y = ops.linear(x, packed)
    assert not y[0].any()
    for m in (1, 2, 3):
        assert error(y[m : m + 1], x[m : m + 1].astype(np.float64) @ weight) < BOUND
    x[1, 3], x[2, 100] = np.nan, np.inf
    y = ops.linear(x, packed)
    assert np.all(np.isnan(y[1:3])) and np.all(np.isfinite(y[[0, 3]]))


def experts_of(kind: str, count: int, hidden: int, width: int, order: str):
    up = [stored(kind, hidden, 2 * width, seed=20 + e)[1] for e in range(count)]
    down = [stored(kind, width, hidden, seed=50 + e)[1] for e in range(count)]
    format = kind.removesuffix("-general")
    for tensors in (*up, *down):
        small = tensors["super_scales"].astype(np.float32) * np.float32(1e-3)
        tensors["super_scales"] = small.astype(ml_dtypes.bfloat16)

    def floats(tensors: Tensors) -> np.ndarray:
        w = formats.decode(format, tensors, "float32").astype(np.float64)
        return w if order == row_order.PLAIN else row_order.unpermute_rows(w)

    packed = ops.repack_experts(format, up, down, order)
    return packed, [floats(t) for t in up], [floats(t) for t in down]


def ffn_float64(x: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    gate, value = np.split(x.astype(np.float64) @ up, 2, axis=1)
    return (gate / (1 + np.exp(-gate)) * value) @ down


@pytest.mark.parametrize(
    ("kind", "order"),
    [(k, o) for k in KINDS for o in row_order.ROW_ORDERS if (k, o) != ("ccq-2t", "fastdeploy-2.1")],
)
def test_moe_equals_float64(kind: str, order: str) -> None:
    packed, up, down = experts_of(kind, 5, 128, 128, order)
    rng = np.random.default_rng(12)
    x = rng.standard_normal((9, 128)).astype(np.float32)
    # Expert 3 gets no token, expert 1 gets them all.
    ids = np.stack([np.ones(9, np.int64), rng.choice([0, 2, 4], 9)], axis=1)
    weights = rng.random((9, 2)).astype(np.float32)
    expected = np.zeros((9, 128))
    for m in range(9):
        for j in range(2):
            e = ids[m, j]
            expected[m] += weights[m, j] * ffn_float64(x[m : m + 1], up[e], down[e])[0]
    for threads in (1, 4):
        assert error(ops.moe(x, packed, ids, weights, threads=threads), expected) < 3 * BOUND


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_routing_gives_each_row_its_own_expert(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.sampled_from([0, 0, 1, 2, 5, 9, 70]), min_size=1, max_size=5))
    k, n = data.draw(st.sampled_from([128, 384])), data.draw(st.sampled_from([16, 48, 144]))
    kind = data.draw(st.sampled_from(KINDS))
    matrices = [stored(kind, k, n, seed=e) for e in range(len(counts))]
    packed = [ops.repack(*m) for m in matrices]
    x = np.random.default_rng(sum(counts)).standard_normal((sum(counts), k)).astype(np.float32)
    y = ops.moe_gemm(x, packed, np.cumsum(counts), threads=2)
    start = 0
    for (format, tensors), count, matrix in zip(matrices, counts, packed, strict=True):
        rows = slice(start, start + count)
        start += count
        weight = formats.decode(format, tensors, "float32").astype(np.float64)
        assert error(y[rows], x[rows].astype(np.float64) @ weight) < BOUND
        np.testing.assert_array_equal(y[rows], ops.linear(x[rows], matrix))


def test_moe_ffn_is_one_expert_after_the_other() -> None:
    packed, up, down = experts_of("wint2", 3, 128, 256, row_order.FASTDEPLOY_2_1)
    x = np.random.default_rng(13).standard_normal((7, 128)).astype(ml_dtypes.bfloat16)
    y = ops.moe_ffn(x, packed, np.array([4, 4, 7], np.int32))
    expected = np.concatenate(
        [ffn_float64(x[:4], up[0], down[0]), ffn_float64(x[4:], up[2], down[2])]
    )
    assert y.dtype == ml_dtypes.bfloat16 and error(y, expected) < 2.5e-3


def test_wrong_arguments_are_named() -> None:
    format, good = stored("wint2", 128, 32)
    packed = ops.repack(format, good)
    x = np.zeros((2, 128), np.float32)
    experts, _, _ = experts_of("wint2", 2, 128, 128, row_order.PLAIN)
    ids, weights = np.zeros((2, 2), np.int64), np.zeros((2, 2), np.float32)
    ends = np.array([1, 2])

    def repack(**changes: np.ndarray) -> object:
        return lambda: ops.repack(format, {**good, **changes})

    words = good["quant_weight"]
    for name, call in [
        ("format", lambda: ops.repack("wint3", good)),
        ("row_order", lambda: ops.repack(format, good, "reversed")),
        (
            "weight_scale",
            repack(weight_scale=good["super_scales"]),
        ),
        ("super_scales", repack(super_scales=x[0, :32])),
        ("code_zp", lambda: ops.repack(format, {s: t for s, t in good.items() if s != "code_zp"})),
        (
            "code_zp",
            repack(code_zp=np.full(32, np.nan, np.float32)),
        ),
        ("code_scale", lambda: ops.dequant(format, {**good, "code_scale": good["code_scale"][:8]})),
        (
            "quant_weight",
            repack(quant_weight=words.T),
        ),
        (
            "quant_weight",
            repack(quant_weight=words[:9]),
        ),
        ("quant_weight: N", lambda: ops.repack(*stored("ccq-2.5", 128, 24))),
        ("dtype", lambda: ops.dequant(format, good, "int8")),
        ("threads", lambda: ops.linear(x, packed, threads=0)),
        ("weight", lambda: ops.linear(x, good)),
        ("x must be a NumPy", lambda: ops.linear(x.tolist(), packed)),
        ("x must be float32", lambda: ops.linear(x.astype(np.float64), packed)),
        ("x must be .tokens, 128", lambda: ops.linear(x[:, :64].copy(), packed)),
        ("x must be C-contiguous", lambda: ops.linear(np.zeros((128, 2), np.float32).T, packed)),
        ("experts", lambda: ops.moe_gemm(x, [], ends)),
        (r"experts\[1\]", lambda: ops.moe_gemm(x, [packed, experts.up_gate[0]], ends)),
        ("offsets", lambda: ops.moe_gemm(x, [packed, packed], np.array([2, 1]))),
        ("offsets", lambda: ops.moe_gemm(x, [packed, packed], np.array([1, 3]))),
        ("offsets", lambda: ops.moe_gemm(x, [packed, packed], np.array([1.0, 2.0]))),
        ("experts", lambda: ops.moe_ffn(x, packed, ends)),
        ("topk_ids", lambda: ops.moe(x, experts, ids + 2, weights)),
        ("topk_ids", lambda: ops.moe(x, experts, ids[:1], weights)),
        ("topk_weights", lambda: ops.moe(x, experts, ids, weights.astype(np.float64))),
        ("down", lambda: ops.repack_experts(format, [good], [good])),
    ]:
        with pytest.raises(ValueError, match=name):
            call()


def test_no_tokens_give_no_rows() -> None:
    packed = ops.repack(*stored("wint2", 128, 32))
    assert ops.linear(np.zeros((0, 128), np.float32), packed).shape == (0, 32)
    experts, _, _ = experts_of("wint2", 2, 128, 128, row_order.PLAIN)
    none = np.zeros((0, 2), np.int64), np.zeros((0, 2), np.float32)
    assert ops.moe(np.zeros((0, 128), np.float32), experts, *none).shape == (0, 128)
