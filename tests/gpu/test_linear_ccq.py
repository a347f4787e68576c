# SPDX-License-Identifier: Apache-2.0
"""Products with matrices of 2.5 and 2.75 bits on a GPU: results off float64, or that move.

Needs torch, a GPU and the library (tests/gpu/gpu_library.py). Skipped otherwise.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
from gpu_library import ccqlib, library, torch

from paddle_ccq.codec import formats, row_order

TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
FORMATS = list(ccqlib.SPARE_FORMATS)


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ccqlib.Library:
    return library(tmp_path_factory.getbasetemp())


def matrices(format: str, experts: int, k: int, n: int, seed: int, order: int):
    """Random stored tensors on the GPU, and float64 [experts, k, n] in input row order."""
    rng = np.random.default_rng(seed)
    words, supers, floats = [], [], []
    for _ in range(experts):
        (shape, name) = formats.tensor_specs(format, k, n)["quant_weight"]
        dtype = formats.SAFETENSORS_DTYPES[name]
        raw = rng.integers(0, 256, int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
        tensors = {
            "quant_weight": raw.view(dtype).reshape(shape),
            "super_scales": (rng.uniform(0.5, 1.5, n) * 1e-3).astype(
                formats.SAFETENSORS_DTYPES["BF16"]
            ),
        }
        w = formats.decode(format, tensors, "float32").astype(np.float64)
        floats.append(row_order.unpermute_rows(w) if order == ccqlib.FASTDEPLOY else w)
        words.append(tensors["quant_weight"])
        supers.append(tensors["super_scales"].view(np.int16))
    quant = torch.from_numpy(np.stack(words)).cuda()
    scales = torch.from_numpy(np.stack(supers)).cuda().view(torch.bfloat16)
    return quant, scales, torch.from_numpy(np.stack(floats)).cuda()


def multiply(lib, format, x, offsets, quant, scales, **options):
    out = torch.full((len(x), quant.shape[2]), float("nan"), device="cuda", dtype=x.dtype)
    lib.spare_gemm(format, x, offsets, quant, scales, out, **options)
    torch.cuda.synchronize()
    return out


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("order", [ccqlib.PLAIN, ccqlib.FASTDEPLOY])
def test_one_matrix_equals_float64(lib, format, dtype, order) -> None:
    for k, n in ((64, 16), (576, 272), (2048, 128)):
        quant, scales, w = matrices(format, 1, k, n, k + n, order)
        for rows in (1, 2, 7, 8, 9, 33, 200):
            x = torch.randn(rows, k, device="cuda").to(dtype)
            out = multiply(lib, format, x, None, quant, scales, order=order)
            want = x.double() @ w[0]
            assert ((out.double() - want).norm() / want.norm()).item() <= TOLERANCE[dtype]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 40, 0], [17, 33, 0, 300]])
def test_experts_row_weights_and_rows_of_nobody(lib, format, counts) -> None:
    quant, scales, w = matrices(format, 4, 256, 160, sum(counts), ccqlib.PLAIN)
    rows, offsets = sum(counts), torch.tensor(counts).cumsum(0).cuda()
    x = torch.randn(rows + 3, 256, device="cuda").bfloat16()
    scale = torch.rand(rows + 3, device="cuda")
    out = multiply(lib, format, x, offsets, quant, scales, row_scale=scale)
    assert out[rows:].isnan().all()
    parts = zip(x[:rows].double().split(counts), w, strict=True)
    want = torch.cat([a @ b for a, b in parts]) * scale[:rows, None].double()
    assert ((out[:rows].double() - want).norm() / want.norm()).item() <= 2.5e-3


@pytest.mark.parametrize("format", FORMATS)
def test_a_rows_bits_do_not_depend_on_the_others(lib, format) -> None:
    quant, scales, _ = matrices(format, 1, 1024, 208, 1, ccqlib.PLAIN)
    x = torch.randn(150, 1024, device="cuda").half()
    whole = multiply(lib, format, x, None, quant, scales)
    again = multiply(lib, format, x, None, quant, scales)
    alone = [multiply(lib, format, x[i : i + 1].clone(), None, quant, scales) for i in (0, 7, 149)]
    assert torch.equal(whole.view(torch.int16), again.view(torch.int16))
    assert torch.equal(whole[[0, 7, 149]], torch.cat(alone))


def test_shapes_that_do_not_fit_are_refused(lib) -> None:
    quant, scales, _ = matrices("ccq-2.75", 2, 128, 32, 2, ccqlib.PLAIN)
    x = torch.randn(4, 128, device="cuda").half()
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        multiply(lib, "ccq-2.75", x, None, quant, scales)  # two experts, no offsets
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        multiply(lib, "ccq-2.75", x, None, quant[:1], scales, order=2)
