# SPDX-License-Identifier: Apache-2.0
"""How every kernel of the GPU benchmarks is timed: shapes, routings, graph replays, the roof."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

TOP_K = 8
# Bits a weight of each contestant's weights as it reads them; group scales of 16 bits for 128
# weights in W4A16.
BITS = {"ccq": 2.0625, "ccq-2t": 2.125,
        "triton-wint2": 2.0625, "marlin-w4": 4.125, "triton-w4": 4.125,
        "triton-w8": 8.0, "cublas-bf16": 16.0, "ccq-2.5": 2.5, "ccq-2.75": 2.75,
        "humming-int2": 2.25, "humming-int4": 4.125}  # fmt: skip
# Replays of one case end after this, so that slow peers do not eat the session.
SECONDS_PER_CASE = 0.3
# A GPU at work on tensor instructions draws its full power and slows down within some tenths of a
# second. Where tokens are this many, contestants run for WARM_SECONDS before they are timed.
WARM_TOKENS, WARM_SECONDS = 512, 0.3
# After such cases it is slower for a while: kernels of few rows took a fifth longer when they came
# at once. So the GPU rests before the next shape.
REST_SECONDS = 1.0
MAX_ROUTINGS = 16


@dataclass(frozen=True)
class Shape:
    """One projection of a layer of `experts` experts, [k, n] each."""

    name: str
    experts: int
    n: int
    k: int

    @property
    def from_tokens(self) -> bool:
        """The first projection, which reads each token's row for all of its experts."""
        return not self.name.endswith("down")


SHAPES = (
    Shape("ERNIE-300B up_gate", 64, 7168, 8192),
    Shape("ERNIE-300B down", 64, 8192, 3584),
    Shape("ERNIE-21B up_gate", 64, 3072, 2560),
    Shape("ERNIE-21B down", 64, 2560, 1536),
    Shape("Qwen3-235B up_gate", 128, 3072, 4096),
    Shape("Qwen3-235B down", 128, 4096, 1536),
    Shape("DeepSeek-V3 TP4 up", 256, 1024, 7168),
    Shape("DeepSeek-V3 TP4 down", 256, 7168, 512),
)
# Not looked at while the kernels and their choice were worked on.
HELD_OUT = (
    Shape("Mixtral-8x7B up_gate", 8, 28672, 4096),
    Shape("GLM-4.5-Air up_gate", 128, 2816, 4096),
    Shape("Kimi-K2 TP8 up", 384, 512, 7168),
)
LINEAR = (
    Shape("linear 4096x4096", 1, 4096, 4096),
    Shape("linear K4096 N1024", 1, 1024, 4096),
    Shape("linear 8192x8192", 1, 8192, 8192),
    Shape("linear K8192 N1024", 1, 1024, 8192),
)


@dataclass(frozen=True)
class Routing:
    """Where `tokens` tokens go: ids [tokens, top_k] int64, inclusive row sums, experts hit."""

    ids: Any
    offsets: Any
    hit: int


def route(torch: Any, tokens: int, experts: int, seed: int, device: str = "cuda") -> Routing:
    """Top-8 of random scores for each token, the same for every contestant."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=g).topk(min(TOP_K, experts), 1).indices
    counts = torch.bincount(ids.reshape(-1), minlength=experts)
    return Routing(ids.to(device), counts.cumsum(0).to(device), int((counts > 0).sum()))


def routings(torch: Any, shape: Shape, tokens: int, device: str = "cuda") -> list[Routing]:
    """Enough routings in turn that weights come from memory; fewer where one reads them all."""
    count = MAX_ROUTINGS if tokens <= 256 else 4
    return [route(torch, tokens, shape.experts, 100 * tokens + i, device) for i in range(count)]


def captured(torch: Any, calls: Sequence[Callable[[], object]]) -> Any:
    """A CUDA graph of all calls, replayed once."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def seconds_of(torch: Any, graph: Any) -> float:
    """Seconds of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def time_side_by_side(
    torch: Any, lists: Sequence[Sequence[Callable[[], object]]], replays: int, warm: float = 0.0
) -> list[float]:
    """Seconds a call of each list: the median over replays of one CUDA graph of its calls.

    The lists take turns, one replay each, so that all see the GPU in the same state.

    warm: seconds for which they run before.
    """
    graphs = [captured(torch, calls) for calls in lists]
    spent = 0.0
    while spent < warm:
        spent += sum(seconds_of(torch, graph) for graph in graphs)
    times: list[list[float]] = [[] for _ in graphs]
    spent, limit = 0.0, SECONDS_PER_CASE * len(graphs)
    while len(times[0]) < 3 or (len(times[0]) < replays and spent < limit):
        for graph, own in zip(graphs, times, strict=True):
            own.append(seconds_of(torch, graph))
            spent += own[-1]
    pairs = zip(times, lists, strict=True)
    return [statistics.median(own) / len(calls) for own, calls in pairs]


def time_calls(torch: Any, calls: Sequence[Callable[[], object]], replays: int) -> float:
    """Seconds a call, as time_side_by_side of one list."""
    return time_side_by_side(torch, [calls], replays)[0]


def memory_rates(torch: Any) -> dict[str, float]:
    """Bytes a second of a copy, an elementwise kernel and a read-only sum over 4 GB."""
    a = torch.randint(0, 1 << 30, (1 << 30,), dtype=torch.int32, device="cuda")
    b = torch.empty_like(a)
    total, floats = torch.empty((), device="cuda"), a.view(torch.float32)
    calls = {
        "copy": (2, lambda: b.copy_(a)),
        "add": (2, lambda: torch.add(a, 1, out=b)),
        "read": (1, lambda: torch.sum(floats, 0, out=total)),
    }
    size = a.numel() * 4
    return {name: n * size / time_calls(torch, [call] * 2, 10) for name, (n, call) in calls.items()}


def device_rates(torch: Any) -> dict[str, float]:
    """Memory in TB/s, a dense bf16 product in TFLOP/s, a kernel that does nothing in µs.

    dense: of the first tenth of a second; sustained: once the GPU has slowed down under the load.
    """
    rates = {name: rate / 1e12 for name, rate in memory_rates(torch).items()}
    torch.cuda.empty_cache()
    x, w = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    out, one = torch.empty_like(x), torch.zeros(1, device="cuda")
    calls = [lambda: torch.mm(x, w, out=out)] * 4
    for name, warm in (("dense", 0.0), ("sustained", 2 * WARM_SECONDS)):
        (seconds,) = time_side_by_side(torch, [calls], 10, warm)
        rates[name] = 2 * 8192**3 / seconds / 1e12
    rates["empty_us"] = time_calls(torch, [lambda: one.fill_(1.0)] * 64, 20) * 1e6
    return rates


def moved_bytes(hit: float, rows: int, k: int, n: int, bits: float) -> float:
    """The hit experts' weights, activations in and outputs out."""
    return hit * n * k * bits / 8 + rows * (k + n) * 2


def figures(
    who: str, tokens: int, rows: int, shape: Shape, hit: float, seconds: float, bandwidth: float
) -> dict:
    """Derived figures of one measurement; the roof is always that of 2.0625 bits.

    bandwidth: bytes a second that this GPU reads (memory_rates).
    """
    own = moved_bytes(hit, rows, shape.k, shape.n, BITS[who])
    roof = moved_bytes(hit, rows, shape.k, shape.n, BITS["ccq"]) / bandwidth
    return {
        "who": who, "shape": shape.name, "tokens": tokens, "rows": rows, "experts_hit": hit,
        "us": seconds * 1e6, "GBps": own / seconds / 1e9, "roof_us": roof * 1e6,
        "percent": 100 * roof / seconds, "TFLOPs": 2 * rows * shape.k * shape.n / seconds / 1e12,
    }  # fmt: skip
