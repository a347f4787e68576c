# SPDX-License-Identifier: Apache-2.0
"""Speed of the WINT2 grouped GEMM on one GPU: time, bandwidth and share of the roof.

    python benchmarks/gpu/ccqlib.py /tmp/libccq.so
    python benchmarks/moe_gemm.py --library /tmp/libccq.so [--json OUT] [--only up_gate]

Method: a CUDA graph of calls, each with another random top-8 routing (so that weights come from
memory and not from L2), replayed; the median replay over the number of calls. The roof counts the
bytes of the experts hit at 2.0625 bits a weight, activations read and outputs written, over
3.0 TB/s (what a device-to-device copy reaches on an H100, measured here too).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))

import ccqlib

ROOF = 3.0e12
BITS = 2.0625
TOP_K = 8
# name: experts, N, K, rows are tokens * TOP_K
SHAPES = {
    "ERNIE-300B up_gate": (64, 7168, 8192),
    "ERNIE-300B down": (64, 8192, 3584),
    "DeepSeek-V3 TP4 up": (256, 1024, 7168),
    "DeepSeek-V3 TP4 down": (256, 7168, 512),
}
LINEAR = {
    "linear 4096x4096": (4096, 4096),
    "linear K4096 N1024": (1024, 4096),
    "linear 8192x8192": (8192, 8192),
    "linear K8192 N1024": (1024, 8192),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def route(torch, tokens: int, experts: int, seed: int):
    """Top-8 of random scores for each token: int64 inclusive sums and the experts hit."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=g).topk(min(TOP_K, experts), 1).indices
    counts = torch.bincount(ids.reshape(-1), minlength=experts)
    return counts.cumsum(0).to(torch.int64), int((counts > 0).sum())


def time_calls(torch, calls, replays: int) -> float:
    """Seconds a call: median over replays of one graph of all calls."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / len(calls))
    return statistics.median(times)


def device_rates(torch) -> str:
    """What the memory gives: a 4 GB copy, an elementwise kernel, a read-only sum."""
    a = torch.randint(0, 1 << 30, (1 << 30,), dtype=torch.int32, device="cuda")
    b = torch.empty_like(a)
    size = a.numel() * 4
    copy = 2 * size / time_calls(torch, [lambda: b.copy_(a)] * 2, 10)
    add = 2 * size / time_calls(torch, [lambda: torch.add(a, 1, out=b)] * 2, 10)
    f = a.view(torch.float32)
    total = torch.empty((), device="cuda")
    read = size / time_calls(torch, [lambda: torch.sum(f, 0, out=total)] * 2, 10)
    return f"copy {copy / 1e12:.2f}, add {add / 1e12:.2f}, read {read / 1e12:.2f} TB/s"


def case(torch, lib, packed, tokens: int, replays: int) -> dict:
    """One row of the table for tokens on packed experts."""
    experts, k, n = packed.experts, packed.k, packed.n
    rows = tokens * (TOP_K if experts > 1 else 1)
    routings = 16
    while routings > 2 and rows * (n + k) * 2 * 1 > 2**31:
        routings //= 2
    x = torch.randn(rows, k, device="cuda").bfloat16()
    out = torch.full((rows, n), float("nan"), device="cuda", dtype=torch.bfloat16)
    workspace = lib.workspace(rows, k, n, experts)
    hits, calls = [], []
    if experts > 1:
        for i in range(routings):
            offsets, hit = route(torch, tokens, experts, 100 * tokens + i)
            hits.append(hit)
            offsets = offsets.cuda()
            calls.append(lambda o=offsets: lib.gemm(x, o, packed, out, workspace))
    else:
        raise ValueError("one expert: use linear_case")
    seconds = time_calls(torch, calls, replays)
    assert not out.isnan().any()
    return result(tokens, rows, k, n, statistics.mean(hits), seconds)


def linear_case(torch, lib, copies, m: int, replays: int) -> dict:
    """One packed matrix, several copies of it in turn so that it comes from memory."""
    k, n = copies[0].k, copies[0].n
    x = torch.randn(m, k, device="cuda").bfloat16()
    out = torch.full((m, n), float("nan"), device="cuda", dtype=torch.bfloat16)
    workspace = lib.workspace(m, k, n, 1)
    calls = [lambda p=p: lib.gemm(x, None, p, out, workspace) for p in copies]
    return result(m, m, k, n, 1, time_calls(torch, calls, replays))


def result(tokens, rows, k, n, hit, seconds) -> dict:
    """Derived figures of one measurement."""
    moved = hit * n * k * BITS / 8 + rows * (k + n) * 2
    return {
        "tokens": tokens, "rows": rows, "experts_hit": hit, "us": seconds * 1e6,
        "GBps": moved / seconds / 1e9, "roof_us": moved / ROOF * 1e6,
        "percent": 100 * moved / ROOF / seconds, "TFLOPs": 2 * rows * k * n / seconds / 1e12,
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", required=True)
    parser.add_argument("--json")
    parser.add_argument("--only", default="", help="substring of the shape's name")
    parser.add_argument("--tokens", default="", help="comma list; default 1..256")
    parser.add_argument("--pairs", default="integer", help="comma list of integer,general")
    parser.add_argument("--variants", default="-1", help="comma list (tuning builds)")
    parser.add_argument("--replays", type=int, default=15)
    parser.add_argument("--no-linear", action="store_true")
    args = parser.parse_args()
    import torch

    lib = ccqlib.Library(args.library)
    tokens = [int(t) for t in args.tokens.split(",")] if args.tokens else TOKENS
    variants = [int(v) for v in args.variants.split(",")]
    rows = []
    print(torch.cuda.get_device_name(), device_rates(torch), flush=True)

    def note(name, pairs, variant, r):
        rows.append({"shape": name, "pairs": pairs, "variant": variant, **r})
        print(f"{name:22s} {pairs[:3]} v{variant:2d} t {r['tokens']:4d} hit {r['experts_hit']:5.1f}"
              f"{r['us']:9.1f} us {r['GBps']:6.0f} GB/s {r['percent']:5.1f} % "
              f"(roof {r['roof_us']:6.1f}) {r['TFLOPs']:6.1f} TF", flush=True)  # fmt: skip

    for pairs in args.pairs.split(","):
        for name, (experts, n, k) in SHAPES.items():
            if args.only not in name:
                continue
            packed = lib.repack(*ccqlib.random_weights(torch, experts, k, n, pairs))
            torch.cuda.empty_cache()
            for variant in variants:
                if variants != [-1]:
                    lib.force_variant(variant)
                for t in tokens:
                    note(name, pairs, variant, case(torch, lib, packed, t, args.replays))
            del packed
        for name, (n, k) in LINEAR.items():
            if args.no_linear or args.only not in name:
                continue
            count = max(2, int(2e8 / (n * k / 4)))  # several times the L2
            copies = [lib.repack(*ccqlib.random_weights(torch, 1, k, n, pairs, seed=i))
                      for i in range(count)]  # fmt: skip
            for variant in variants:
                if variants != [-1]:
                    lib.force_variant(variant)
                for m in (1, 4, 16):
                    note(name, pairs, variant, linear_case(torch, lib, copies, m, args.replays))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
