# SPDX-License-Identifier: Apache-2.0
"""The grouped GEMM with CCQ-2T weights on a GPU against float64, through ctypes and torch.

Needs torch, a GPU and the library (tests/gpu/gpu_library.py). Skipped otherwise.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from gpu_library import ccqlib, library, torch

# Relative errors for many outputs. Rounding outputs to bfloat16 gives 1.66e-3; kernels for many
# rows round weights to 8 bits as well, 2.36e-3 in all.
TOLERANCE = {torch.bfloat16: 1.75e-3, torch.float16: 3e-4}
MANY_ROWS_TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 5e-4}
FIRST_FOR_FEW_ROWS = 40
DTYPES = [torch.bfloat16, torch.float16]
# Kernels by number (custom_ops/gpu/moe/choice.h): many rows, then few.
KERNELS = [*range(10, 17), *range(40, 47)]


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    return library(tmp_path_factory.getbasetemp())


def decoded(weights, expert=0):
    return ccqlib.decode_trellis(torch, *(t[expert] for t in weights))


def tolerance(lib, dtype, outputs):
    """Of the kernel that ran last. Both norms are sums over the outputs, so with few of them their
    ratio spreads: in 4,000 draws of 16 outputs, rounded weights gave 6.2e-3 at most, rounded
    outputs alone 3.2e-3; in 500 draws of 304 outputs 2.9e-3 and 2.0e-3."""
    table = TOLERANCE if lib.variant >= FIRST_FOR_FEW_ROWS else MANY_ROWS_TOLERANCE
    return table[dtype] * (1 + 7 / outputs**0.5)


def multiply(lib, packed, x, offsets, row_scale=None):
    """The product twice, over different contents of output and workspace: the same bits."""
    results = []
    for fill in (255, 85):
        out = torch.empty(x.shape[0], packed.n, device="cuda", dtype=x.dtype)
        out.view(torch.uint8).fill_(255)  # NaN
        workspace = lib.workspace(x.shape[0], packed.k, packed.n, packed.experts).fill_(fill)
        lib.gemm(x, offsets, packed, out, workspace, row_scale=row_scale)
        torch.cuda.synchronize()
        results.append(out)
    assert torch.equal(results[0].view(torch.int16), results[1].view(torch.int16))
    return results[0]


def run(lib, shape, rows, dtype, *, seed=0, offsets=None, row_scale=False, spread=1.0,
        matrix=False):  # fmt: skip
    weights = ccqlib.random_trellis(torch, *shape, seed=seed)
    packed, experts, k = lib.repack_trellis(*weights), shape[0], shape[1]
    g = torch.Generator(device="cuda").manual_seed(1000 + seed)
    x = torch.randn(rows, k, generator=g, device="cuda")
    if spread != 1.0:
        x *= spread ** torch.randn(rows, k, generator=g, device="cuda")
    x = x.to(dtype)
    if offsets is None:
        offsets = ccqlib.random_offsets(torch, experts, rows, seed)
    scale = torch.rand(rows, generator=g, device="cuda") if row_scale else None
    out = multiply(lib, packed, x, None if matrix else offsets.cuda(), scale)
    want = torch.full((rows, shape[2]), float("nan"), device="cuda", dtype=torch.float64)
    begin = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > begin:
            want[begin:end] = x[begin:end].double() @ decoded(weights, expert)
        begin = end
    if scale is not None:
        want *= scale.double()[:, None]
    error = ((out.double() - want).norm() / want.norm()).item()
    worst = ((out.double() - want).abs().amax(1) / want.abs().amax(1)).max().item()
    assert error <= tolerance(lib, dtype, out.numel()), (error, worst)
    assert worst <= 8 * MANY_ROWS_TOLERANCE[dtype], (error, worst)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 65, 1000, 4096])
def test_row_counts(lib, rows, dtype):
    run(lib, (6, 640, 304), rows, dtype, seed=rows, row_scale=rows % 3 == 0)


@pytest.mark.parametrize("shape", [(1, 128, 16), (3, 128, 48), (2, 1024, 256), (5, 1152, 528),
                                   (8, 4096, 1024), (64, 512, 272), (300, 256, 32),
                                   (3, 8192, 448), (2, 14336, 128)])  # fmt: skip
@pytest.mark.parametrize("rows", [1, 5, 13, 25, 40, 300])
def test_shapes(lib, shape, rows):
    run(lib, shape, rows, torch.bfloat16, seed=rows)


@pytest.mark.parametrize("rows", [1, 20, 65, 1000])
def test_one_expert_takes_all(lib, rows):
    for expert in (0, 3, 6):
        offsets = torch.zeros(7, dtype=torch.int64)
        offsets[expert:] = rows
        run(lib, (7, 1024, 512), rows, torch.bfloat16, offsets=offsets)


def test_values_of_very_different_size(lib):
    for rows in (2, 100):
        run(lib, (4, 2048, 256), rows, torch.bfloat16, spread=4.0)


def every_word():
    """Bytes whose column c has all pairs (j, j + c), and local scales 1 to 8."""
    k, n = 2048, 256
    i, c = torch.arange(k // 4, device="cuda")[:, None], torch.arange(n, device="cuda")
    q = ((i // 2 + i % 2 * c) % 256).to(torch.uint8)[None]
    pairs = q[0, :-1].long() * 256 + q[0, 1:].long()
    assert pairs.unique().numel() == 65536
    scales = torch.randint(0, 8, (1, k // 64, n), device="cuda", dtype=torch.uint8) + 1
    ws = (scales[:, ::2] << 4 | scales[:, 1::2]).contiguous()
    return q, ws, torch.ones(1, n, device="cuda", dtype=torch.bfloat16)


def test_all_words(lib):
    """Identity activations give the weights themselves, by both kinds of kernel."""
    weights = every_word()
    packed, want = lib.repack_trellis(*weights), decoded(weights)
    x = torch.eye(packed.k, device="cuda").half()
    assert torch.equal(multiply(lib, packed, x, None).double(), want)  # up to 2040: exact in fp16
    for rows in x.split(4):
        out = multiply(lib, packed, rows, None).double()
        assert torch.allclose(out, rows.double() @ want, rtol=1e-3, atol=0)


def test_repack_round_trip(lib):
    for shape in ((3, 640, 304), (1, 128, 16), (2, 1024, 256)):
        for dtype in DTYPES:
            q, ws, ss = ccqlib.random_trellis(torch, *shape)
            stored = q, ws, ss.to(dtype)
            for a, b in zip(lib.unpack_trellis(lib.repack_trellis(*stored), dtype), stored,
                            strict=True):  # fmt: skip
                assert torch.equal(a, b)


def test_rows_from_the_middle_of_a_column(lib):
    """A part of the input rows, with the bytes before it, multiplies as it does in the whole."""
    q, ws, ss = ccqlib.random_trellis(torch, 2, 1024, 128)
    part = slice(384 // 4, None)
    before = q[:, 384 // 4 - 1].contiguous()
    packed = lib.repack_trellis(q[:, part].contiguous(), ws[:, 3:].contiguous(), ss, before)
    offsets = torch.tensor([2, 4], device="cuda")
    x = torch.randn(4, 640, device="cuda").bfloat16()
    want = torch.cat(
        [x[2 * e : 2 * e + 2].double() @ decoded((q, ws, ss), e)[384:] for e in (0, 1)]
    )
    out = multiply(lib, packed, x, offsets).double()
    assert ((out - want).norm() / want.norm()).item() <= tolerance(lib, torch.bfloat16, out.numel())


def test_rows_of_nobody_stay(lib):
    weights = ccqlib.random_trellis(torch, 3, 512, 128)
    packed = lib.repack_trellis(*weights)
    for rows, used in ((4, 2), (200, 150)):
        x = torch.randn(rows, 512, device="cuda").bfloat16()
        offsets = torch.tensor([1, used, used], device="cuda")
        out = torch.full((rows, 128), 7.0, device="cuda", dtype=torch.bfloat16)
        lib.gemm(x, offsets, packed, out, lib.workspace(rows, 512, 128, 3))
        torch.cuda.synchronize()
        assert (out[used:] == 7).all() and (out[:used] != 7).any(1).all()


def test_row_that_is_not_finite_is_nan_alone(lib):
    packed = lib.repack_trellis(*ccqlib.random_trellis(torch, 2, 512, 128))
    for rows in (3, 60):
        x = torch.randn(rows, 512, device="cuda").bfloat16()
        x[1, 17] = float("inf")
        offsets = torch.tensor([2, rows], device="cuda")
        out = multiply(lib, packed, x, offsets)
        finite = out.isfinite().all(1).tolist()
        assert finite[0] and not finite[1] and all(finite[2:])


def test_graph_capture(lib):
    packed = lib.repack_trellis(*ccqlib.random_trellis(torch, 6, 1024, 256))
    for rows in (1, 7, 300):
        x = torch.randn(rows, 1024, device="cuda").bfloat16()
        offsets = ccqlib.random_offsets(torch, 6, rows, 1).cuda()
        want = multiply(lib, packed, x, offsets)
        out, workspace = torch.full_like(want, float("nan")), lib.workspace(rows, 1024, 256, 6)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            lib.gemm(x, offsets, packed, out, workspace)
        for _ in range(3):
            out.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out.view(torch.int16), want.view(torch.int16))


@pytest.mark.parametrize("kernel", KERNELS)
def test_forced(lib, kernel):
    if not hasattr(lib.lib, "ccq_moe_gemm_force_variant"):
        pytest.skip("not a tuning build (-DCCQ_TUNING)")
    lib.force_variant(kernel)
    ran = 0
    try:
        shapes = (5, 640, 304), (2, 128, 16), (3, 1536, 528), (3, 3584, 144), (1, 128, 16)
        for rows in (1, 3, 9, 21, 70):
            for shape in shapes:
                try:
                    run(lib, shape, rows, torch.bfloat16, seed=rows, matrix=shape[0] == 1)
                    ran += 1
                except RuntimeError as error:  # a kernel that does not take this K
                    assert "CUDA error 9" in str(error)
    finally:
        lib.force_variant(-1)
    assert ran >= 4


def test_refused(lib):
    packed = lib.repack_trellis(*ccqlib.random_trellis(torch, 2, 512, 128))
    x = torch.randn(4, 512, device="cuda").bfloat16()
    out, workspace = torch.empty(4, 128, device="cuda").bfloat16(), lib.workspace(4, 512, 128, 2)
    offsets = torch.tensor([2, 4], device="cuda")
    with pytest.raises(RuntimeError, match="CUDA error 1"):  # rows in plain order alone
        lib.gemm(x, offsets, packed, out, workspace, order=ccqlib.FASTDEPLOY)
