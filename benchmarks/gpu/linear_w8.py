# SPDX-License-Identifier: Apache-2.0
"""The product with 8-bit weights beside float64, and its time beside the memory's rate."""

from __future__ import annotations

from typing import Any

# ERNIE-4.5-300B's dense matrices (K, N), and small ones with edges.
TIMED = {
    "qkv": (8192, 10240),
    "o": (8192, 8192),
    "up_gate": (8192, 57344),
    "down": (28672, 8192),
}
CHECKED = [(64, 16), (128, 48), (192, 144), (512, 768), (8192, 1040), (3584, 8192)]
ROWS = (1, 2, 7, 8, 9, 16, 17, 32, 33, 64)
TIMED_ROWS = (1, 8, 16, 32, 64, 128, 192, 256)
RATE = 4.54e12  # bytes a second that a read reaches on an H200


def _made(torch: Any, k: int, n: int) -> tuple[Any, Any, Any]:
    from paddle_ccq.vllm.layout import product_units

    states = torch.randint(1, 256, (n, k), dtype=torch.uint8, device="cuda")
    scale = (torch.rand(n, device="cuda") * 0.01 + 0.001).to(torch.bfloat16)
    return states, product_units(states).contiguous(), scale


def check(torch: Any, k: int, n: int) -> dict[str, float]:
    """The largest relative error over numbers of rows, for both ways of multiplying."""
    from paddle_ccq.vllm import torch_ops

    states, units, scale = _made(torch, k, n)
    counters = torch.zeros(torch_ops.counters_of(n), dtype=torch.int32, device="cuda")
    exact = (states.double() - 128) * scale.double()[:, None]
    worst = {"stored": 0.0, "decoded": 0.0}
    for rows in (*ROWS, 100, 300):
        x = torch.randn((rows, k), device="cuda").to(torch.bfloat16)
        wanted = x.double() @ exact.t()
        found = torch_ops.linear_w8(x, units, scale, counters)
        again = torch_ops.linear_w8(x, units, scale, counters)
        assert torch.equal(found, again), "not the same twice"
        assert not counters.any(), "counters are left behind"
        error = float((found.double() - wanted).norm() / wanted.norm())
        which = "decoded" if rows > torch_ops.LINEAR_ROWS else "stored"
        worst[which] = max(worst[which], error)
    return worst


def graph_seconds(torch: Any, calls: list[Any]) -> float:
    """Median seconds of one call in a captured graph of all, over replays."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return sorted(times)[len(times) // 2]


def measure() -> dict[str, Any]:
    import torch

    from paddle_ccq.vllm import torch_ops

    result: dict[str, Any] = {"errors": {}, "microseconds": {}}
    for k, n in CHECKED:
        result["errors"][f"{k}x{n}"] = check(torch, k, n)
        print("error", k, n, result["errors"][f"{k}x{n}"], flush=True)
    for name, (k, n) in TIMED.items():
        # More bytes than the cache holds, so that every product reads from memory.
        copies = max(2, -(-(400 << 20) // (k * n)))
        made = [_made(torch, k, n)[1:] for _ in range(copies)]
        counters = torch.zeros(torch_ops.counters_of(n), dtype=torch.int32, device="cuda")
        for rows in TIMED_ROWS:
            x = torch.randn((rows, k), device="cuda").to(torch.bfloat16)
            ways = {"stored": 1 << 30, "decoded": 0}
            if rows < 64:
                del ways["decoded"]
            for way, limit in ways.items():
                torch_ops.LINEAR_ROWS, kept = limit, torch_ops.LINEAR_ROWS
                calls = [
                    lambda u=units, s=scale: torch_ops.linear_w8(x, u, s, counters)  # noqa: B023
                    for units, scale in made * 4
                ]
                seconds = graph_seconds(torch, calls)
                torch_ops.LINEAR_ROWS = kept
                share = k * n / seconds / RATE
                result["microseconds"][f"{name} {rows} {way}"] = seconds * 1e6
                print(f"{name:8} {rows:4} {way:8} {seconds * 1e6:8.1f} us {share:6.1%}", flush=True)
    return result
