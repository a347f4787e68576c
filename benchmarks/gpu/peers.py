# SPDX-License-Identifier: Apache-2.0
"""Who runs in the grouped-GEMM benchmark: the project's kernel and its peers, one interface."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import ccqlib
import measure
from measure import Routing, Shape

# Output rounding to bfloat16 alone is 1.6e-3 of the norm.
TOLERANCE = 2.5e-3


class Peer(Protocol):
    """A grouped GEMM that can be timed.

    Attributes:
        who: key of measure.BITS.
        tolerance: the largest error that `check` may find.
    """

    who: str
    tolerance: float

    def weights(self, shape: Shape) -> Any:
        """Random weights of a shape on the GPU."""

    def variants(self, shape: Shape, tokens: int, routes: list[Routing], weights: Any) -> list:
        """Lists of calls, one call a routing; the fastest list counts. Empty: not for this case."""

    def check(self) -> float:
        """Relative error of a small case against float64."""


class Ccq:
    """The project's kernel; `check` is tests/gpu/test_moe_gemm.py."""

    who, tolerance = "ccq", TOLERANCE

    def __init__(
        self, torch: Any, library: ccqlib.Library, pairs: str = "integer", variant: int = -1
    ) -> None:
        """variant: the kernel to force, in tuning builds; -1: the library's own choice."""
        self.torch, self.library, self.pairs, self.variant = torch, library, pairs, variant

    def weights(self, shape: Shape) -> ccqlib.Packed:
        stored = ccqlib.random_weights(self.torch, shape.experts, shape.k, shape.n, self.pairs)
        return self.library.repack(*stored)

    def ran(self) -> int:
        """Number of the kernel of the last call."""
        return self.library.variant

    def variants(
        self, shape: Shape, tokens: int, routes: list[Routing], weights: ccqlib.Packed
    ) -> list:
        x, out = buffers(self.torch, routes, shape)
        workspace = self.library.workspace(len(x), shape.k, shape.n, shape.experts)

        def call(route: Routing) -> None:
            if self.variant >= 0:
                self.library.force_variant(self.variant)
            order = ccqlib.FASTDEPLOY  # that of checkpoints
            self.library.gemm(x, route.offsets, weights, out, workspace, order=order)
            if self.variant >= 0:
                self.library.force_variant(-1)

        return [[partial(call, r) for r in routes]]

    def check(self) -> float:
        return 0.0


class Ccq2t:
    """The project's kernels for CCQ-2T; `check` is tests/gpu/test_trellis_gemm.py."""

    who, tolerance = "ccq-2t", TOLERANCE

    def __init__(self, torch: Any, library: ccqlib.Library) -> None:
        self.torch, self.library = torch, library

    def weights(self, shape: Shape) -> ccqlib.Packed:
        stored = ccqlib.random_trellis(self.torch, shape.experts, shape.k, shape.n)
        return self.library.repack_trellis(*stored)

    def variants(
        self, shape: Shape, tokens: int, routes: list[Routing], weights: ccqlib.Packed
    ) -> list:
        x, out = buffers(self.torch, routes, shape)
        workspace = self.library.workspace(len(x), shape.k, shape.n, shape.experts)
        gemm = self.library.gemm
        return [[lambda r=r: gemm(x, r.offsets, weights, out, workspace) for r in routes]]

    def check(self) -> float:
        return 0.0


class Triton:
    """The plain tile-loop kernels of triton_kernels.py."""

    tolerance = TOLERANCE

    def __init__(self, torch: Any, who: str, device: str = "cuda") -> None:
        import triton_kernels

        self.kernels, self.torch, self.who, self.device = triton_kernels, torch, who, device

    def weights(self, shape: Shape) -> tuple:
        if self.who == "triton-wint2":
            return ccqlib.random_weights(self.torch, shape.experts, shape.k, shape.n)
        return self.kernels.random_weights(
            self.torch, self.who, shape.experts, shape.k, shape.n, self.device
        )

    def variants(self, shape: Shape, tokens: int, routes: list[Routing], weights: tuple) -> list:
        x, out = buffers(self.torch, routes, shape)
        size = self.kernels.row_block(len(x), shape.experts)
        blocks = [self.kernels.row_blocks(self.torch, r.offsets, size) for r in routes]
        run = self.kernels.run
        return [
            [lambda b=b, c=c: run(self.who, x, weights, out, b, size, *c) for b in blocks]
            for c in self.kernels.CONFIGURATIONS
        ]

    def check(self) -> float:
        torch, worst = self.torch, 0.0
        shape = Shape("check", 5, 320, 512)
        weights = self.weights(shape)
        for rows in (3, 40, 700):
            offsets = ccqlib.random_offsets(torch, shape.experts, rows, rows).to(self.device)
            x = torch.randn(rows, shape.k, device=self.device).bfloat16()
            want = torch.empty(rows, shape.n, device=self.device, dtype=torch.float64)
            begin = 0
            for expert, end in enumerate(offsets.tolist()):
                if self.who == "triton-wint2":
                    w = ccqlib.decode(torch, *(t[expert] for t in weights))
                else:
                    w = self.kernels.decode(torch, self.who, weights, expert)
                want[begin:end] = x[begin:end].double() @ w
                begin = end
            size = self.kernels.row_block(rows, shape.experts)
            blocks = self.kernels.row_blocks(torch, offsets, size)
            for configuration in self.kernels.CONFIGURATIONS:
                out = torch.full_like(want, float("nan")).bfloat16()
                self.kernels.run(self.who, x, weights, out, blocks, size, *configuration)
                worst = max(worst, ((out.double() - want).norm() / want.norm()).item())
        return worst


class Cublas:
    """One dense bfloat16 product of the same rows: what prefill could reach with dense weights."""

    who, tolerance = "cublas-bf16", TOLERANCE
    FEWEST_TOKENS = 1024

    def __init__(self, torch: Any) -> None:
        self.torch = torch

    def weights(self, shape: Shape) -> Any:
        return self.torch.randn(shape.k, shape.n, device="cuda").bfloat16()

    def variants(self, shape: Shape, tokens: int, routes: list[Routing], weights: Any) -> list:
        if tokens < self.FEWEST_TOKENS:
            return []
        x, out = buffers(self.torch, routes, shape)
        return [[lambda: self.torch.mm(x, weights, out=out)] * 2]

    def check(self) -> float:
        return 0.0


def buffers(torch: Any, routes: list[Routing], shape: Shape) -> tuple[Any, Any]:
    """Activations sorted by expert and an output that shows what was not written."""
    rows, device = routes[0].ids.numel(), routes[0].ids.device
    x = torch.randn(rows, shape.k, device=device).bfloat16()
    out = torch.full((rows, shape.n), float("nan"), device=device, dtype=torch.bfloat16)
    return x, out


def chosen(torch: Any, library: ccqlib.Library, names: list[str], marlin: str | None, pairs: str,
           variants: list[int], cases: list[tuple[Shape, int]]) -> list[Peer]:  # fmt: skip
    """The project's kernel first, then the peers asked for, each checked.

    variants: kernels of the project's to force, -1 for its choice.
    cases: (shape, rows) to come, for peers that compile themselves.

    Raises:
        SystemExit: naming the peer whose result is wrong.
    """
    found: list[Peer] = [Ccq(torch, library, pairs, variant) for variant in variants]
    if "ccq-2t" in names:
        found.append(Ccq2t(torch, library))
    if marlin:
        from marlin import Marlin

        found.append(Marlin(torch, marlin))
    if "triton" in names:
        found += [Triton(torch, who) for who in ("triton-wint2", "triton-w4", "triton-w8")]
    if "humming" in names:
        from humming_peer import FORMATS, Humming

        for who in FORMATS:
            found.append(Humming(torch, who))
            found[-1].compile(cases)
    if "cublas" in names:
        found.append(Cublas(torch))
    for peer in found:
        error = peer.check()
        if not error <= peer.tolerance:
            raise SystemExit(f"error: {peer.who}: off by {error:.2e} against float64")
    return found


def side_by_side(
    torch: Any, contestants: list[tuple[Peer, Any]], shape: Shape, tokens: int, replays: int,
    bandwidth: float,
) -> list[tuple[Peer, dict]]:  # fmt: skip
    """The figures of all contestants that have something for one case, timed in turns.

    contestants: peers and their weights of the shape. The fastest of a peer's lists counts.
    """
    routes = measure.routings(torch, shape, tokens)
    lists, whose = [], []
    for peer, weights in contestants:
        own = peer.variants(shape, tokens, routes, weights)
        lists += own
        whose += [peer] * len(own)
    if not lists:
        return []
    warm = measure.WARM_SECONDS if tokens >= measure.WARM_TOKENS else 0.0
    times = measure.time_side_by_side(torch, lists, replays, warm)
    rows = routes[0].ids.numel()
    hit = sum(r.hit for r in routes) / len(routes)
    found = []
    for peer, _ in contestants:
        own = [seconds for who, seconds in zip(whose, times, strict=True) if who is peer]
        if own:
            case = (peer.who, tokens, rows, shape, hit, min(own), bandwidth)
            found.append((peer, measure.figures(*case)))
    return found
