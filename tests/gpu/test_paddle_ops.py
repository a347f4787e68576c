# SPDX-License-Identifier: Apache-2.0
"""The ops through Paddle on a GPU: wrong results, results that move, errors without a name.

PADDLE_CCQ_PADDLE_OPS names the compiled ops (custom_ops/paddle). Inputs and references are made in
NumPy and no operator of Paddle's own is used, so that a build without kernels for this GPU will do.
"""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest

from paddle_ccq import _core
from paddle_ccq import ops as cpu_ops
from paddle_ccq.codec import formats, row_order
from paddle_ccq.codec.formats import Tensors
from paddle_ccq.encoder import layouts, recipes
from paddle_ccq.encoder.search import pair_books
from paddle_ccq.ops import gpu as ops_gpu
from paddle_ccq.ops import paddle_gpu

LIBRARY = os.environ.get("PADDLE_CCQ_PADDLE_OPS")
if not LIBRARY:
    pytest.skip("PADDLE_CCQ_PADDLE_OPS is not set", allow_module_level=True)
paddle = pytest.importorskip("paddle")
paddle.set_device("gpu:0")
call = paddle_gpu.call
TOLERANCE = {"bfloat16": 2.5e-3, "float16": 6e-4}


def gpu(array: np.ndarray) -> object:
    array = np.ascontiguousarray(array)
    place = paddle.CUDAPlace(0)
    if array.dtype == ml_dtypes.bfloat16:
        return paddle.to_tensor(array.view(np.uint16), dtype="bfloat16", place=place)
    return paddle.to_tensor(array, place=place)


def host(tensor: object) -> np.ndarray:
    array = tensor.numpy()
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array


def stored(kind: str, k: int, n: int, seed: int) -> tuple[str, Tensors]:
    rng = np.random.default_rng(seed)
    format = kind.removesuffix("-general")
    tensors = {}
    for suffix, (shape, name) in formats.tensor_specs(format, k, n).items():
        dtype = formats.SAFETENSORS_DTYPES[name]
        if suffix == "super_scales":
            tensors[suffix] = (rng.uniform(0.5, 1.5, shape) * 1e-3).astype(dtype)
        elif suffix == "code_scale":
            general = rng.uniform(100, 121, shape)
            tensors[suffix] = (np.full(shape, 121.0) if kind == format else general).astype(dtype)
        elif suffix == "code_zp":
            integer, general = rng.integers(0, 1913, shape), rng.uniform(0, 1900, shape)
            tensors[suffix] = (integer if kind == format else general).astype(dtype)
        else:
            raw = rng.integers(0, 256, int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
            tensors[suffix] = raw.view(dtype).reshape(shape)
    return format, tensors


def experts_of(kind: str, count: int, k: int, n: int, order: str, seed: int) -> tuple[list, list]:
    """Repacked tensors with the pair kind last, and float64 [k, n] in input row order."""
    parts = [stored(kind, k, n, seed + e)[1] for e in range(count)]
    names = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")
    stacked = [gpu(np.stack([p[name] for p in parts])) for name in names]
    quant, scales, columns, pair_kind = call("ccq_repack", *stacked)
    integer = bool(host(pair_kind)[0] == 0)
    assert integer == (kind == "wint2")
    floats = [formats.decode("wint2", p, "float32").astype(np.float64) for p in parts]
    if order != row_order.PLAIN:
        floats = [row_order.unpermute_rows(w) for w in floats]
    return [quant, scales, columns, integer], floats


def activations(rows: int, k: int, dtype: str, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, k)).astype(np.float32)
    return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)


def error(out: np.ndarray, expected: np.ndarray) -> float:
    out = out.astype(np.float64)
    assert out.shape == expected.shape and np.all(np.isfinite(out))
    return float(np.linalg.norm(out - expected) / (np.linalg.norm(expected) or 1.0))


def ffn(x: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    gate, value = np.split(x.astype(np.float64) @ up, 2, axis=1)
    return (gate / (1 + np.exp(-gate)) * value) @ down


@pytest.mark.parametrize("kind", ["wint2", "wint2-general", "ccq-2.5", "ccq-2.75"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dequant_is_the_codec_bit_for_bit(kind: str, dtype: str) -> None:
    format, t = stored(kind, 512, 144, seed=1)
    rest = [gpu(t[s]) if s in t else None for s in ("weight_scale", "code_scale", "code_zp")]
    inputs = gpu(t["quant_weight"]), gpu(t["super_scales"]), *rest
    (out,) = call("ccq_dequant", *inputs, format, dtype)
    expected = formats.decode(format, t, dtype)
    np.testing.assert_array_equal(host(out).astype(np.float32), expected)


@pytest.mark.parametrize("kind", ["wint2", "wint2-general"])
@pytest.mark.parametrize("order", row_order.ROW_ORDERS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_linear(kind: str, order: str, dtype: str) -> None:
    packed, (weight,) = experts_of(kind, 1, 512, 272, order, seed=2)
    *tensors, integer = packed
    for rows in (1, 2, 7, 8, 17, 64, 65, 1000):
        x = activations(rows, 512, dtype, seed=rows)
        (out,) = call("ccq_linear", gpu(x), *tensors, integer, order)
        assert error(host(out), x.astype(np.float64) @ weight) < TOLERANCE[dtype]


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 40, 0], [17, 33, 0, 128]])
def test_grouped_gemm_with_empty_experts_and_row_weights(counts: list[int]) -> None:
    packed, weights = experts_of("wint2", 4, 256, 160, row_order.PLAIN, seed=3)
    *tensors, integer = packed
    x = activations(sum(counts), 256, "bfloat16", seed=4)
    ends = np.cumsum(counts)
    scale = np.random.default_rng(5).random(len(x)).astype(np.float32)
    rows = np.split(x, ends[:-1])
    expected = np.concatenate(
        [r.astype(np.float64) @ w for r, w in zip(rows, weights, strict=True)]
    )
    for row_scale, factor in ((None, 1.0), (gpu(scale), scale[:, None])):
        inputs = gpu(x), gpu(ends), *tensors, row_scale
        (out,) = call("ccq_moe_gemm", *inputs, integer, "plain")
        assert error(host(out), expected * factor) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize("kind", ["wint2", "wint2-general"])
@pytest.mark.parametrize("order", row_order.ROW_ORDERS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens", [1, 9, 130])
def test_moe_block_equals_float64_and_repeats_its_bits(
    kind: str, order: str, dtype: str, tokens: int
) -> None:
    up, up_float = experts_of(kind, 5, 256, 512, order, seed=6)
    down, down_float = experts_of(kind, 5, 256, 256, order, seed=60)
    rng = np.random.default_rng(tokens)
    x = activations(tokens, 256, dtype, seed=tokens)
    # Expert 1 takes every token, expert 3 none.
    ids = np.stack([np.ones(tokens, np.int64), rng.choice([0, 2, 4], tokens)], axis=1)
    weights = rng.random((tokens, 2)).astype(np.float32)
    expected = np.zeros((tokens, 256))
    for j in range(2):
        for e in range(5):
            mine = ids[:, j] == e
            expected[mine] += weights[mine, j, None] * ffn(x[mine], up_float[e], down_float[e])
    inputs = gpu(x), gpu(ids), gpu(weights), *up[:3], *down[:3], up[3], down[3], order
    first = host(call("ccq_moe", *inputs)[0])
    # The middle and each expert's row are rounded to 16 bits too.
    assert error(first, expected) < 2 * TOLERANCE[dtype]
    again = host(call("ccq_moe", *inputs)[0])
    np.testing.assert_array_equal(first.view(np.uint16), again.view(np.uint16))
    # The same block without dispatch, for the tokens of expert 1.
    ends = gpu(np.array([0, tokens, tokens, tokens, tokens]))
    (out,) = call("ccq_moe_ffn", gpu(x), ends, *up[:3], *down[:3], up[3], down[3], order)
    assert error(host(out), ffn(x, up_float[1], down_float[1])) < 2 * TOLERANCE[dtype]


def stored_experts(
    format: str, count: int, k: int, n: int, order: str, seed: int
) -> tuple[list, list[np.ndarray]]:
    """Stacked stored tensors of a spare-scale format, and float64 [k, n] in input row order."""
    parts = [stored(format, k, n, seed + e)[1] for e in range(count)]
    tensors = [gpu(np.stack([p[s] for p in parts])) for s in ("quant_weight", "super_scales")]
    floats = [formats.decode(format, p, "float32").astype(np.float64) for p in parts]
    if order != row_order.PLAIN:
        floats = [row_order.unpermute_rows(w) for w in floats]
    return tensors, floats


@pytest.mark.parametrize("format", ["ccq-2.5", "ccq-2.75"])
@pytest.mark.parametrize("order", row_order.ROW_ORDERS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_products_with_stored_matrices(format: str, order: str, dtype: str) -> None:
    tensors, (weight,) = stored_experts(format, 1, 320, 272, order, seed=10)
    for rows in (1, 2, 8, 9, 65):
        x = activations(rows, 320, dtype, seed=rows)
        (out,) = call("ccq_linear_stored", gpu(x), *tensors, format, order)
        assert error(host(out), x.astype(np.float64) @ weight) < TOLERANCE[dtype]
    tensors, weights = stored_experts(format, 4, 256, 160, order, seed=11)
    counts = [3, 0, 20, 1]
    x = activations(sum(counts), 256, dtype, seed=12)
    ends = np.cumsum(counts)
    scale = np.random.default_rng(5).random(len(x)).astype(np.float32)
    rows = zip(np.split(x, ends[:-1]), weights, strict=True)
    expected = np.concatenate([r.astype(np.float64) @ w for r, w in rows]) * scale[:, None]
    inputs = gpu(x), gpu(ends), *tensors, gpu(scale)
    (out,) = call("ccq_moe_gemm_stored", *inputs, format, order)
    assert error(host(out), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("format", ["ccq-2.5", "ccq-2.75"])
@pytest.mark.parametrize("order", row_order.ROW_ORDERS)
@pytest.mark.parametrize("tokens", [1, 33])
def test_moe_block_with_stored_matrices(format: str, order: str, tokens: int) -> None:
    up, up_float = stored_experts(format, 5, 256, 512, order, seed=13)
    down, down_float = stored_experts(format, 5, 256, 256, order, seed=14)
    rng = np.random.default_rng(tokens)
    x = activations(tokens, 256, "bfloat16", seed=tokens)
    ids = np.stack([np.ones(tokens, np.int64), rng.choice([0, 2, 4], tokens)], axis=1)
    weights = rng.random((tokens, 2)).astype(np.float32)
    expected = np.zeros((tokens, 256))
    for j in range(2):
        for e in range(5):
            mine = ids[:, j] == e
            expected[mine] += weights[mine, j, None] * ffn(x[mine], up_float[e], down_float[e])
    inputs = gpu(x), gpu(ids), gpu(weights), *up, *down, format, order
    first = host(call("ccq_moe_stored", *inputs)[0])
    assert error(first, expected) < 2 * TOLERANCE["bfloat16"]
    again = host(call("ccq_moe_stored", *inputs)[0])
    np.testing.assert_array_equal(first.view(np.uint16), again.view(np.uint16))
    ends = gpu(np.array([0, tokens, tokens, tokens, tokens]))
    (out,) = call("ccq_moe_ffn_stored", gpu(x), ends, *up, *down, format, order)
    assert error(host(out), ffn(x, up_float[1], down_float[1])) < 2 * TOLERANCE["bfloat16"]


@pytest.mark.parametrize("kind", ["wint2", "wint2-general", "ccq-2t", "ccq-2.5", "ccq-2.75"])
def test_python_functions_take_every_format_like_the_cpu(kind: str) -> None:
    format, order = kind.removesuffix("-general"), "fastdeploy-2.1"
    order = row_order.PLAIN if format == "ccq-2t" else order
    up = [stored(kind, 256, 512, 20 + e)[1] for e in range(3)]
    down = [stored(kind, 256, 256, 30 + e)[1] for e in range(3)]
    there, here = (m.repack_experts(format, up, down, order) for m in (paddle_gpu, cpu_ops))
    x = activations(9, 256, "bfloat16", seed=16)
    ids = np.random.default_rng(17).integers(0, 3, (9, 2))
    weights = np.random.default_rng(18).random((9, 2)).astype(np.float32)
    ends = np.array([4, 4, 9])
    on_gpu = [
        paddle_gpu.moe(gpu(x), there, gpu(ids), gpu(weights)),
        paddle_gpu.moe_ffn(gpu(x), there, gpu(ends)),
        paddle_gpu.moe_gemm(gpu(x), there.up_gate, gpu(ends)),
        paddle_gpu.linear(gpu(x), paddle_gpu.repack(format, up[0], order)),
    ]
    on_cpu = [
        cpu_ops.moe(x, here, ids, weights),
        cpu_ops.moe_ffn(x, here, ends),
        cpu_ops.moe_gemm(x, here.up_gate, ends),
        cpu_ops.linear(x, cpu_ops.repack(format, up[0], order)),
    ]
    if format != "ccq-2t":
        on_gpu.append(paddle_gpu.dequant(format, up[0], "float16"))
        on_cpu.append(cpu_ops.dequant(format, up[0], "float16"))
    for found, expected in zip(on_gpu, on_cpu, strict=True):
        # Both round: twice the tolerance of one.
        assert error(host(found), expected.astype(np.float64)) < 4 * TOLERANCE["bfloat16"]
    for match, arguments in [
        ("x must be bfloat16 or float16", (gpu(np.zeros((2, 256), np.float32)), ids)),
        ("topk_ids must be int64", (gpu(x), gpu(ids.astype(np.int32)))),
        (r"topk_ids must be \[9, -1\]", (gpu(x), gpu(ids[:3]))),
        ("topk_ids must be a Paddle tensor", (gpu(x), ids)),
    ]:
        with pytest.raises(ValueError, match=match):
            paddle_gpu.moe(arguments[0], there, arguments[1], gpu(weights))


@pytest.mark.parametrize("format", ["wint2", "ccq-2.5", "ccq-2.75"])
@pytest.mark.parametrize("preset", ["fast", "default"])
def test_encode_is_the_cpu_encoder_byte_for_byte(format: str, preset: str) -> None:
    layout, recipe = layouts.LAYOUTS[format], recipes.RECIPES[format][preset]
    books = pair_books(format, recipe)
    w = np.random.default_rng(15).standard_normal((50, 384)).astype(np.float32)
    w[3], w[4, :64] = 0, 0
    entries, *attributes = ops_gpu.encode_arguments(books, layout.as_dict(), recipe.as_dict())
    found = [host(t) for t in call("ccq_encode", gpu(w), gpu(entries), *attributes)]
    bits = list(layout.index_bits)
    expected = _core.encode(w, books, bits, layout.as_dict(), recipe.as_dict(), 2, "auto")
    for name, value in zip(("words", "scales", "supers", "pairs", "sums"), found, strict=True):
        assert value.tobytes() == expected[name].tobytes(), name


def test_wrong_arguments_are_named() -> None:
    packed, _ = experts_of("wint2", 1, 256, 64, row_order.PLAIN, seed=7)
    quant, scales, columns, _ = packed
    x = gpu(activations(2, 256, "bfloat16", seed=8))
    cpu = paddle.to_tensor(np.zeros((2, 256), np.float16), place=paddle.CPUPlace())
    narrow = gpu(activations(2, 128, "bfloat16", seed=9))
    for match, inputs in [
        ("x must be bfloat16 or float16", (gpu(np.zeros((2, 256), np.float32)), quant)),
        ("x must be on a GPU", (cpu, quant)),
        (r"x must be \[any, 256\]", (narrow, quant)),
        ("quant has the wrong dtype", (x, columns)),
        ("row_order must be", (x, quant)),
    ]:
        order = "backwards" if "row_order" in match else "plain"
        with pytest.raises(Exception, match=match):
            call("ccq_linear", *inputs, scales, columns, True, order)
