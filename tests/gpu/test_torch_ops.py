# SPDX-License-Identifier: Apache-2.0
"""The operators that vLLM's layers call, without vLLM: CCQ-2T experts, whole and cut for two ranks.

Needs torch, a GPU and the library that PADDLE_CCQ_GPU_LIBRARY names. Skipped otherwise.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
from gpu_library import ccqlib, torch

from paddle_ccq.ops import gpu_abi, gpu_library

if not gpu_library.available():
    pytest.skip("no library for the GPU", allow_module_level=True)

from paddle_ccq.vllm import torch_ops

EXPERTS, HIDDEN, WIDTH, TOP_K = 5, 256, 512, 2


def packed(q, ws, ss, before) -> list:
    """Each expert repacked into its place, as layers are loaded."""
    experts, k, n = q.shape[0], q.shape[1] * 4, q.shape[2]
    size, columns = gpu_abi.trellis_bytes(k, n)
    units = torch.full((experts, size), 255, device="cuda", dtype=torch.uint8)
    supers = torch.full((experts, columns // 4), float("nan"), device="cuda")
    for e in range(experts):
        names = ("quant_weight", "weight_scale", "super_scales", "before")
        tensors = (t[e].contiguous() for t in (q, ws, ss, before))
        torch_ops.repack_trellis(dict(zip(names, tensors, strict=True)), units[e], supers[e])
    return [units, supers]


@pytest.mark.parametrize("tokens", [1, 4, 9, 64, 300])
@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_of_ccq_2t(tokens: int, ranks: int) -> None:
    torch.manual_seed(tokens)
    up = ccqlib.random_trellis(torch, EXPERTS, HIDDEN, 2 * WIDTH, seed=1)
    down = ccqlib.random_trellis(torch, EXPERTS, WIDTH, HIDDEN, seed=2)
    x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
    ids = torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_K, 1).indices
    weights = torch.rand(tokens, TOP_K, device="cuda")
    want = torch.zeros(tokens, HIDDEN, device="cuda", dtype=torch.float64)
    for e in range(EXPERTS):
        w_up, w_down = (ccqlib.decode_trellis(torch, *(t[e] for t in w)) for w in (up, down))
        gate, value = (x.double() @ w_up).chunk(2, 1)
        share = (weights * (ids == e)).double().sum(1, keepdim=True)
        want += share * ((gate * gate.sigmoid() * value) @ w_down)
    sums, own = torch.zeros_like(want), WIDTH // ranks
    for rank in range(ranks):
        part = slice(rank * own, (rank + 1) * own)
        columns = torch.cat([torch.arange(WIDTH, device="cuda")[part] + i * WIDTH for i in (0, 1)])
        zeros = torch.zeros(EXPERTS, 2 * own, device="cuda", dtype=torch.uint8)
        first = packed(*(t[..., columns] for t in up), zeros)
        q, ws, ss = down
        before = q[:, rank * own // 4 - 1] if rank else torch.zeros_like(q[:, 0])
        rows = slice(rank * own // 4, (rank + 1) * own // 4)
        scales = slice(rank * own // 128, (rank + 1) * own // 128)
        second = packed(q[:, rows], ws[:, scales], ss, before)
        pairs = [gpu_abi.PAIRS_TRELLIS] * 2
        sums += torch_ops.experts_packed(
            x, weights, ids, first, second, own, pairs, gpu_abi.ROWS_PLAIN
        ).double()
    # The middle and each expert's row are rounded too.
    assert ((sums - want).norm() / want.norm()).item() <= 6e-3
