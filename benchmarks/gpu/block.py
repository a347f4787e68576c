# SPDX-License-Identifier: Apache-2.0
"""The whole expert block (dispatch, up_gate, SwiGLU, down, combine) in one CUDA graph, timed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import ccqlib
import measure

# name, experts, hidden, width
BLOCKS = (("ERNIE-300B block", 64, 8192, 3584), ("DeepSeek-V3 TP4 block", 256, 7168, 512))
TOKENS = (1, 4, 16, 64)
# The aim at one token: this many times the sum of the two products' roofs, and launches.
FACTOR, LAUNCHES_US = 1.2, 8.0


def gemm_seconds(
    torch: Any, library: ccqlib.Library, packed: ccqlib.Packed, routes: list, replays: int
) -> float:
    """One product of the block alone."""
    rows = routes[0].ids.numel()
    x = torch.randn(rows, packed.k, device="cuda").bfloat16()
    out = torch.empty(rows, packed.n, device="cuda", dtype=torch.bfloat16)
    room = library.workspace(rows, packed.k, packed.n, packed.experts)
    calls = [
        partial(library.gemm, x, r.offsets, packed, out, room, order=ccqlib.FASTDEPLOY)
        for r in routes
    ]
    return measure.time_calls(torch, calls, replays)


def one(
    torch: Any, library: ccqlib.Library, up: ccqlib.Packed, down: ccqlib.Packed, tokens: int,
    replays: int, bandwidth: float,
) -> dict:  # fmt: skip
    """The block at `tokens` tokens, its two products alone, and the limit."""
    shapes = [measure.Shape("", p.experts, p.n, p.k) for p in (up, down)]
    routes = measure.routings(torch, shapes[0], tokens)
    rows = routes[0].ids.numel()
    x = torch.randn(tokens, up.k, device="cuda").bfloat16()
    out = torch.full_like(x, float("nan"))
    weights = torch.rand(routes[0].ids.shape, device="cuda")
    room = library.moe_workspace(tokens, weights.shape[1], up, down)
    calls = [
        partial(library.moe, x, r.ids, weights, up, down, out, room, order=ccqlib.FASTDEPLOY)
        for r in routes
    ]
    whole = measure.time_calls(torch, calls, replays)
    if not bool(out.isfinite().all()):
        raise SystemExit(f"error: the block of {tokens} tokens left outputs unwritten")
    parts = [gemm_seconds(torch, library, p, routes, replays) for p in (up, down)]
    hit = sum(r.hit for r in routes) / len(routes)
    bits = measure.BITS["ccq"]
    roofs = sum(measure.moved_bytes(hit, rows, s.k, s.n, bits) for s in shapes) / bandwidth
    return {
        "tokens": tokens, "experts_hit": hit, "us": whole * 1e6, "up_us": parts[0] * 1e6,
        "down_us": parts[1] * 1e6, "rest_us": (whole - sum(parts)) * 1e6, "roofs_us": roofs * 1e6,
        "limit_us": FACTOR * roofs * 1e6 + LAUNCHES_US,
    }  # fmt: skip


def measured(
    torch: Any, library: ccqlib.Library, bandwidth: float, only: str = "", replays: int = 15
) -> Iterator[dict]:
    """One row a block and token count."""
    for name, experts, hidden, width in BLOCKS:
        if only in name:
            up = library.repack(*ccqlib.random_weights(torch, experts, hidden, 2 * width))
            down = library.repack(*ccqlib.random_weights(torch, experts, width, hidden, seed=1))
            torch.cuda.empty_cache()
            for tokens in TOKENS:
                yield {"shape": name} | one(torch, library, up, down, tokens, replays, bandwidth)
