# SPDX-License-Identifier: Apache-2.0
"""Times of the products besides the 2-bit experts that vLLM's layers call: wint4 experts, router.

Shapes of ERNIE-4.5-300B; weights come from memory. Whether they are right is tested in
tests/gpu/test_linear_w4.py and test_router.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from linear_w8 import graph_seconds

EXPERTS, HIDDEN, WIDTH, CHOSEN = 64, 8192, 3584, 8
MATRICES = {"up_gate": (HIDDEN, 2 * WIDTH), "down": (WIDTH, HIDDEN)}
FEW, ROUTED = (1, 2, 4, 8, 16, 32, 64, 128), (1, 8, 16, 32, 64)
PROMPTS = (256, 512, 1024, 4096, 8192)
ROUTINGS, ROUTERS = 8, 40  # so many that weights are not in the cache when they are read again


def _matrix(torch: Any, device: str, k: int, n: int) -> list[Any]:
    """Weights [experts, n, k / 2] of two 4-bit states a byte, scales [experts, n, k / 128]."""
    weight = torch.randint(0, 256, (EXPERTS, n, k // 2), dtype=torch.uint8, device=device)
    scale = (torch.rand((EXPERTS, n, 1), device=device) * 1e-3 + 1e-3).to(torch.bfloat16)
    return [weight, scale.repeat(1, 1, k // 128).contiguous()]


def few_rows(torch: Any, device: str = "cuda") -> dict[str, Any]:
    """{"matrix tokens": [microseconds, experts read]} of the kernel for few rows an expert."""
    from paddle_ccq.vllm import torch_ops

    found = {}
    for name, (k, n) in MATRICES.items():
        matrix = _matrix(torch, device, k, n)
        for tokens in FEW:
            x = torch.randn((tokens * CHOSEN, k), device=device).to(torch.bfloat16)
            ends = []
            for _ in range(ROUTINGS):
                ids = torch.rand((tokens, EXPERTS), device=device).topk(CHOSEN)[1].flatten()
                ends.append(torch.bincount(ids, minlength=EXPERTS).cumsum(0))
            calls = [partial(torch_ops._w4, x, e, matrix, tokens) for e in ends]
            seconds = graph_seconds(torch, calls)
            counts = [e.diff(prepend=e.new_zeros(1)) for e in ends]
            read = sum(int((c > 0).sum()) for c in counts) / ROUTINGS
            found[f"{name} {tokens}"] = [seconds * 1e6, round(read)]
            print("wint4", name, tokens, *found[f"{name} {tokens}"], flush=True)
    return found


def routers(torch: Any, device: str = "cuda") -> dict[str, Any]:
    """{tokens: [microseconds, those of cuBLAS's float32 product]}."""
    from paddle_ccq.vllm import torch_ops
    from paddle_ccq.vllm.gpu_router import parts_of

    weights = [torch.randn((EXPERTS, HIDDEN), device=device) for _ in range(ROUTERS)]
    parts = [parts_of(weight) for weight in weights]
    found = {}
    for tokens in ROUTED:
        x = torch.randn((tokens, HIDDEN), device=device).to(torch.bfloat16)
        wide = x.float()
        own = [partial(torch_ops.router, x, *pair) for pair in zip(parts, weights, strict=True)]
        other = [partial(torch.mm, wide, weight.t()) for weight in weights]
        found[str(tokens)] = [graph_seconds(torch, calls) * 1e6 for calls in (own, other)]
        print("router", tokens, *found[str(tokens)], flush=True)
    return found


def _milliseconds(torch: Any, call: Callable[[], Any]) -> float:
    """The least of three calls, the card being waited for after each."""
    call()
    torch.cuda.synchronize()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def prompts(torch: Any, device: str = "cuda") -> dict[str, Any]:
    """{tokens: [milliseconds of a layer's wint4 experts, those of vLLM's own]}."""
    from vllm.model_executor.layers.fused_moe import fused_experts
    from vllm.model_executor.layers.fused_moe.config import int4_w4a16_moe_quant_config

    from paddle_ccq.vllm import torch_ops

    up, down = (_matrix(torch, device, *MATRICES[name]) for name in ("up_gate", "down"))
    config = int4_w4a16_moe_quant_config(
        w1_scale=up[1], w2_scale=down[1], w1_zp=None, w2_zp=None, block_shape=[0, 128]
    )
    found = {}
    for tokens in PROMPTS:
        x = torch.randn((tokens, HIDDEN), device=device).to(torch.bfloat16)
        ids = torch.rand((tokens, EXPERTS), device=device).topk(CHOSEN)[1]
        weights = torch.rand((tokens, CHOSEN), device=device)
        routing = {"topk_weights": weights, "topk_ids": ids}
        calls = (
            partial(torch_ops.experts_w4, x, weights, ids, up, down),
            partial(fused_experts, x, up[0], down[0], **routing, quant_config=config),
        )
        found[str(tokens)] = [_milliseconds(torch, call) for call in calls]
        print("wint4 of a prompt", tokens, *found[str(tokens)], flush=True)
    return found


def measure() -> dict[str, Any]:
    """The three as vllm_report.py reads them."""
    import torch

    torch.manual_seed(0)
    return {
        "w4": {"microseconds, experts read": few_rows(torch)},
        "router": {"microseconds, cuBLAS": routers(torch)},
        "w4_prompts": prompts(torch),
    }
