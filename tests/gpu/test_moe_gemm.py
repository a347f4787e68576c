# SPDX-License-Identifier: Apache-2.0
"""The grouped GEMM on a GPU against float64, through ctypes and torch.

Needs torch, a GPU and the library (tests/gpu/gpu_library.py). Skipped otherwise.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from gpu_library import ccqlib, library, torch

TOLERANCE = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    return library(tmp_path_factory.getbasetemp())


def reference(x, offsets, weights, order, row_scale=None):
    out = torch.full((x.shape[0], weights[0].shape[2]), float("nan"), device="cuda",
                     dtype=torch.float64)  # fmt: skip
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        if end > begin:
            w = ccqlib.decode(torch, *(t[e] for t in weights), fastdeploy=order == 1)
            out[begin:end] = x[begin:end].double() @ w
        begin = end
    return out if row_scale is None else out * row_scale.double()[:, None]


def run(lib, weights, rows, dtype, *, seed=0, order=0, offsets=None, row_scale=False, spread=1.0):
    experts, n = weights[0].shape[0], weights[0].shape[2]
    packed = lib.repack(*weights)
    g = torch.Generator(device="cuda").manual_seed(1000 + seed)
    x = torch.randn(rows, packed.k, generator=g, device="cuda")
    if spread != 1.0:
        x *= spread ** torch.randn(rows, packed.k, generator=g, device="cuda")
    x = x.to(dtype)
    if offsets is None:
        offsets = ccqlib.random_offsets(torch, experts, rows, seed)
    offsets = offsets.cuda()
    scale = torch.rand(rows, generator=g, device="cuda") if row_scale else None
    out = torch.full((rows, n), float("nan"), device="cuda", dtype=dtype)
    workspace = lib.workspace(rows, packed.k, n, experts)
    lib.gemm(x, offsets, packed, out, workspace, order=order, row_scale=scale)
    torch.cuda.synchronize()
    want = reference(x, offsets, weights, order, scale)
    error = ((out.double() - want).norm() / want.norm()).item()
    worst = ((out.double() - want).abs().amax(1) / want.abs().amax(1)).max().item()
    assert error <= TOLERANCE[dtype], (error, worst)
    assert worst <= 8 * TOLERANCE[dtype], (error, worst)
    # The same call again, over other workspace contents: the same bits.
    again = torch.full_like(out, float("nan"))
    workspace.random_(0, 256)
    lib.gemm(x, offsets, packed, again, workspace, order=order, row_scale=scale)
    torch.cuda.synchronize()
    assert torch.equal(out.view(torch.int16), again.view(torch.int16))
    return error


@pytest.mark.parametrize("pairs", ["integer", "general"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 64, 65, 1000, 4096])
def test_row_counts(lib, rows, dtype, pairs):
    weights = ccqlib.random_weights(torch, 6, 640, 304, pairs, seed=rows)
    run(lib, weights, rows, dtype, seed=rows, order=rows % 2, row_scale=rows % 3 == 0)


@pytest.mark.parametrize("shape", [(1, 128, 16), (3, 128, 48), (2, 1024, 256), (5, 1152, 528),
                                   (8, 4096, 1024), (64, 512, 272), (300, 256, 32)])  # fmt: skip
@pytest.mark.parametrize("rows", [1, 5, 40, 300])
def test_shapes(lib, shape, rows):
    weights = ccqlib.random_weights(torch, *shape, "integer", seed=rows)
    for order in (0, 1):
        run(lib, weights, rows, torch.bfloat16, seed=rows, order=order)


@pytest.mark.parametrize("rows", [1, 20, 65, 1000])
def test_one_expert_takes_all(lib, rows):
    weights = ccqlib.random_weights(torch, 7, 1024, 512, "integer", seed=rows)
    for expert in (0, 3, 6):
        offsets = torch.zeros(7, dtype=torch.int64)
        offsets[expert:] = rows
        run(lib, weights, rows, torch.bfloat16, offsets=offsets)


@pytest.mark.parametrize("pair", [(121.0, 0.0), (121.0, 1912.0), (-121.0, 32000.0), (1.0, 5.0),
                                  (128.37, 13.7), (100.123, 0.2), (-96.5, 30000.25)])  # fmt: skip
def test_all_codes(lib, pair):
    """Identity activations give the weights themselves: every byte, bit for bit."""
    k, n = 1024, 64
    q = torch.arange(k // 4, device="cuda")[None, :, None] * 37
    q = ((q + torch.arange(n, device="cuda") * 11) % 256).to(torch.uint8)
    ws = torch.randint(0, 256, (1, k // 128, n), device="cuda", dtype=torch.uint8)
    ss = torch.full((1, n), 1.0, device="cuda", dtype=torch.bfloat16)
    cs, zp = (torch.full((1, n), v, device="cuda") for v in pair)
    assert q.unique().numel() == 256
    packed = lib.repack(q, ws, ss, cs, zp)
    x = torch.eye(k, device="cuda").half()
    for order in (0, 1):
        want = ccqlib.decode(torch, q[0], ws[0], ss[0], cs[0], zp[0], fastdeploy=order == 1)
        for kinds in {packed.pairs, ccqlib.GENERAL}:
            out = torch.full((k, n), float("nan"), device="cuda", dtype=torch.float16)
            workspace = lib.workspace(k, k, n, 1)
            lib.gemm(x, None, packed, out, workspace, order=order, pairs=kinds)
            torch.cuda.synchronize()
            assert torch.equal(out.double(), want)  # integers up to 480: exact in fp16


def test_repack_round_trip(lib):
    for pairs in ("integer", "general"):
        for shape in ((3, 640, 304), (1, 128, 16), (2, 1024, 256)):
            weights = ccqlib.random_weights(torch, *shape, pairs)
            packed = lib.repack(*weights)
            assert packed.pairs == (ccqlib.INTEGER if pairs == "integer" else ccqlib.GENERAL)
            for a, b in zip(lib.unpack(packed, torch.bfloat16), weights, strict=True):
                assert torch.equal(a, b)


# Each kernel with shapes that the choice gives it on an H100, not divisible by its tiles.
KERNELS = [
    (20, 1, 4224, 1040, 1), (21, 1, 4096, 4112, 1), (22, 1, 4096, 8208, 1),
    (23, 16, 1152, 8208, 4), (24, 64, 640, 7184, 15), (26, 8, 1408, 8208, 5),
    (27, 1, 4224, 1616, 4), (28, 1, 4224, 3216, 4), (28, 1, 4224, 1040, 16),
    (29, 1, 4096, 8208, 3), (29, 24, 1152, 272, 48),
    (30, 8, 4224, 2064, 5), (31, 8, 1664, 7184, 16), (31, 64, 4096, 7184, 32),
    (32, 64, 2176, 1040, 130), (32, 300, 1664, 208, 800), (33, 8, 2176, 4112, 40),
    (32, 8, 8192, 4112, 30), (50, 64, 512, 272, 164), (0, 64, 512, 272, 640),
    (50, 64, 4096, 7184, 400), (50, 8, 8192, 4112, 60), (51, 16, 512, 1040, 112),
    (60, 64, 1664, 1040, 700), (60, 64, 4096, 3088, 1000), (61, 64, 4096, 3088, 2200),
    (3, 1, 2176, 8208, 20), (3, 1, 8192, 1040, 60), (3, 7, 1152, 528, 100),
    (10, 32, 1024, 8208, 700), (13, 8, 640, 4112, 200), (11, 16, 2176, 4112, 600),
    (14, 8, 4096, 4112, 400), (14, 3, 4096, 8208, 177), (12, 16, 2176, 8208, 800),
    (13, 8, 1152, 4112, 640), (14, 8, 1152, 4112, 880), (14, 64, 512, 272, 7000),
    (15, 4, 2048, 4112, 2200), (14, 1, 2048, 8208, 100), (16, 3, 4096, 8208, 2400),
    (16, 16, 2176, 2064, 9000),
]  # fmt: skip


@pytest.mark.parametrize("pairs", ["integer", "general"])
@pytest.mark.parametrize("case", KERNELS, ids=lambda c: "-".join(map(str, c)))
def test_every_kernel(lib, case, pairs):
    variant, experts, k, n, rows = case
    weights = ccqlib.random_weights(torch, experts, k, n, pairs, seed=rows)
    for order, dtype in enumerate(DTYPES):
        run(lib, weights, rows, dtype, seed=rows, order=order, row_scale=order == 1)
        device = torch.cuda.get_device_properties(0)
        if device.major == 9 and device.multi_processor_count == 132:
            assert lib.variant == variant


FORCED = (*range(4), *range(10, 17), *range(20, 34), 50, 51, 60, 61)


@pytest.mark.parametrize("variant", FORCED)
def test_forced_kernels_on_small_shapes(lib, variant):
    """Also those that only other GPUs choose; what the sanitizers look at."""
    if not hasattr(lib.lib, "ccq_moe_gemm_force_variant"):
        pytest.skip("not a tuning build (-DCCQ_TUNING)")
    lib.force_variant(variant)
    try:
        for rows, pairs, shape in ((3, "integer", (3, 640, 304)), (70, "general", (2, 1152, 272))):
            weights = ccqlib.random_weights(torch, *shape, pairs)
            run(lib, weights, rows, torch.bfloat16, order=rows % 2)
            assert lib.variant == variant
    finally:
        lib.force_variant(-1)


@pytest.mark.parametrize(("k", "n", "rows"), [(16384, 8208, 3), (32768, 1040, 1), (65536, 272, 2)])
def test_rows_too_long_for_shared_memory(lib, k, n, rows):
    weights = ccqlib.random_weights(torch, 1, k, n)
    run(lib, weights, rows, torch.bfloat16)


@pytest.mark.parametrize(("k", "rows"), [(2048, 1), (1024, 1), (1024, 30), (1024, 100)])
def test_a_row_that_is_not_finite_spoils_no_other(lib, k, rows):
    weights = ccqlib.random_weights(torch, 1, k, 272)
    packed = lib.repack(*weights)
    x = torch.randn(rows, k, device="cuda").bfloat16()
    x[rows // 2, k - 3] = float("nan")
    out = torch.full((rows, 272), 7.0, device="cuda", dtype=torch.bfloat16)
    lib.gemm(x, None, packed, out, lib.workspace(rows, k, 272, 1))
    finite = out.isfinite().all(1)
    assert not out[rows // 2].isfinite().any() and finite.sum() == rows - 1


def test_wide_activations(lib):
    """Values over twelve orders of magnitude, and rows of very different size."""
    weights = ccqlib.random_weights(torch, 4, 1024, 256)
    for rows in (1, 4, 50, 200):  # each kernel
        run(lib, weights, rows, torch.bfloat16, seed=rows, spread=30.0)


def test_zero_and_infinite_rows(lib):
    weights = ccqlib.random_weights(torch, 1, 256, 64)
    packed = lib.repack(*weights)
    x = torch.randn(4, 256, device="cuda").bfloat16()
    x[0] = 0
    x[2, 17] = float("inf")
    x[3] *= 2.0**-120
    out = torch.full((4, 64), 7.0, device="cuda", dtype=torch.bfloat16)
    lib.gemm(x, None, packed, out, lib.workspace(4, 256, 64, 1))
    assert out[0].abs().max() == 0 and out[1].isfinite().all() and out[3].isfinite().all()
    assert not out[2].isfinite().any()


def test_graph_capture_and_tail_rows(lib):
    weights = ccqlib.random_weights(torch, 8, 2048, 512)
    packed = lib.repack(*weights)
    rows = 24
    x = torch.randn(rows, 2048, device="cuda").bfloat16()
    offsets = ccqlib.random_offsets(torch, 8, 20, 1).cuda()  # four rows belong to nobody
    out = torch.full((rows, 512), float("nan"), device="cuda", dtype=torch.bfloat16)
    workspace = lib.workspace(rows, 2048, 512, 8)
    lib.gemm(x, offsets, packed, out, workspace)
    torch.cuda.synchronize()
    first = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lib.gemm(x, offsets, packed, out, workspace)
    out.fill_(float("nan"))
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out[:20], first[:20]) and out[20:].isnan().all()


def test_bad_arguments(lib):
    weights = ccqlib.random_weights(torch, 2, 256, 64)
    packed = lib.repack(*weights)
    x = torch.randn(4, 256, device="cuda").bfloat16()
    out = torch.empty(4, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        lib.gemm(x, None, packed, out, lib.workspace(4, 256, 64, 2))  # two experts, no offsets
    packed.n = 60
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        lib.gemm(x, None, packed, out, lib.workspace(4, 256, 64, 2))
