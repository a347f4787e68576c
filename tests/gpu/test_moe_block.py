# SPDX-License-Identifier: Apache-2.0
"""Dispatch, SwiGLU, combine and the whole expert block on a GPU, through ctypes and torch.

Needs torch, a GPU and the library (tests/gpu/gpu_library.py). Skipped otherwise.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from gpu_library import ccqlib, library, torch

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ccqlib.Library:
    return library(tmp_path_factory.getbasetemp())


def error(found, want) -> float:
    return ((found.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("tokens,top_k,experts", [(1, 1, 1), (1, 8, 64), (37, 3, 7), (300, 8, 256)])
def test_dispatch_sorts_stably_and_combine_undoes_it(lib, tokens, top_k, experts) -> None:
    hidden = 264
    ids = torch.randint(0, experts, (tokens, top_k), device="cuda")
    if tokens > 1:
        ids[0, 0], ids[1, 0] = -1, experts  # nobody's: they take no row
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    offsets = torch.full((experts,), -7, device="cuda")
    place = torch.full((tokens, top_k), -7, device="cuda", dtype=torch.int32)
    rows = torch.full((tokens * top_k, hidden), float("nan"), device="cuda").bfloat16()
    lib.dispatch(ids, x, experts, offsets, place, rows)
    flat = ids.reshape(-1)
    known = (flat >= 0) & (flat < experts)
    assert torch.equal(offsets, torch.bincount(flat[known], minlength=experts).cumsum(0))
    order = torch.sort(torch.where(known, flat, experts), stable=True).indices[: int(known.sum())]
    want = torch.full_like(flat, -1)
    want[order] = torch.arange(len(order), device="cuda")
    assert torch.equal(place.reshape(-1).long(), want)
    assert torch.equal(rows[: len(order)], x[order // top_k])
    weights = torch.rand(tokens, top_k, device="cuda")
    out = torch.full_like(x, float("nan"))
    lib.combine(rows, place, weights, out)
    sums = (weights * known.reshape(ids.shape)).double().sum(1, keepdim=True)
    assert error(out, x.double() * sums) <= 2.5e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 136), (129, 3584)])
def test_swiglu(lib, dtype, shape) -> None:
    x = (torch.randn(shape[0], 2 * shape[1], device="cuda") * 4).to(dtype)
    out = torch.full(shape, float("nan"), device="cuda", dtype=dtype)
    lib.swiglu(x, out)
    gate, up = x.double().chunk(2, 1)
    want = gate * gate.sigmoid() * up
    assert error(out, want) <= (4e-3 if dtype == torch.bfloat16 else 5e-4)
    wide = torch.tensor([[-200.0, -90, 90, 200, 0, 1, -1, 5, *[1.0] * 8]], device="cuda").to(dtype)
    out = torch.empty(1, 8, device="cuda", dtype=dtype)
    lib.swiglu(wide, out)
    assert out.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 9, 130])
@pytest.mark.parametrize("pairs", ["integer", "general", "ccq-2t"])
def test_block_equals_float64_in_a_graph_too(lib, tokens, pairs) -> None:
    torch.manual_seed(tokens)
    experts, hidden, width, top_k = 5, 256, 384, 2
    sides = [(experts, hidden, 2 * width), (experts, width, hidden)]
    if pairs == "ccq-2t":
        stored = [ccqlib.random_trellis(torch, *side, seed=i) for i, side in enumerate(sides)]
        up, down = (lib.repack_trellis(*tensors) for tensors in stored)
        decode = ccqlib.decode_trellis
    else:
        stored = [ccqlib.random_weights(torch, *side, pairs, i) for i, side in enumerate(sides)]
        up, down = (lib.repack(*tensors) for tensors in stored)
        decode = ccqlib.decode
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    ids = torch.rand(tokens, experts, device="cuda").topk(top_k, 1).indices
    ids[:, 0][ids[:, 0] == 3] = 1  # an expert of few or no rows
    weights = torch.rand(tokens, top_k, device="cuda")
    want = torch.zeros(tokens, hidden, device="cuda", dtype=torch.float64)
    for e in range(experts):
        w_up, w_down = (decode(torch, *(t[e] for t in tensors)) for tensors in stored)
        gate, value = (x.double() @ w_up).chunk(2, 1)
        share = (weights * (ids == e)).double().sum(1, keepdim=True)
        want += share * ((gate * gate.sigmoid() * value) @ w_down)
    out = torch.full_like(x, float("nan"))
    workspace = lib.moe_workspace(tokens, top_k, up, down)
    lib.moe(x, ids, weights, up, down, out, workspace)
    torch.cuda.synchronize()
    # The middle and each expert's row are rounded too: 3.7e-3, of one small token up to 5.3e-3.
    assert error(out, want) <= 6e-3
    first = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lib.moe(x, ids, weights, up, down, out, workspace)
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out.view(torch.int16), first.view(torch.int16))
