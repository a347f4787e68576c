# SPDX-License-Identifier: Apache-2.0
"""vLLM's Marlin MoE kernel (4-bit weights, groups of 128) through its compiled library.

The library is `_moe_C_stable_libtorch.abi3.so` of a vLLM wheel built for the installed torch
(0.26.0 for torch 2.11 and CUDA 13); nothing else of vLLM is needed. As `fused_marlin_moe` calls it
in vLLM 0.26.0: its operator schema, its rule for the row block, the routing aligned to that block.
"""

from __future__ import annotations

from typing import Any

from measure import Routing, Shape

GROUP = 128
# vllm.scalar_type.scalar_types.uint4b8.id: no exponent, 4 bits, bias 8, IEEE NaN handling.
UINT4_BIAS8 = 4 << 8 | 8 << 17 | 1 << 50
BLOCKS = (8, 16, 32, 48, 64)
BLOCKS_PER_MULTIPROCESSOR = 4


class Marlin:
    """The peer "marlin-w4"; see peers.Peer."""

    who, tolerance = "marlin-w4", 2.5e-3

    def __init__(self, torch: Any, path: str) -> None:
        self.torch = torch
        torch.ops.load_library(path)
        self.ops = torch.ops._moe_C
        count = torch.cuda.get_device_properties(0).multi_processor_count
        # Locks: zero before the first call and left zero by every call.
        self.locks = torch.zeros(
            count * BLOCKS_PER_MULTIPROCESSOR, dtype=torch.int32, device="cuda"
        )

    def weights(self, shape: Shape) -> tuple:
        """Random words in Marlin's own layout: every word is legal, and 4.125 bits a weight."""
        torch = self.torch
        size = (shape.experts, shape.k // 16, shape.n * 2)
        words = torch.randint(-(2**31), 2**31 - 1, size, dtype=torch.int32, device="cuda")
        scales = torch.rand(shape.experts, shape.k // GROUP, shape.n, device="cuda") / 64
        return words, scales.bfloat16()

    def align(self, routing: Routing, experts: int) -> tuple:
        """The routing with every expert's rows padded to the row block, and that block."""
        torch = self.torch
        ids = routing.ids.to(torch.int32)
        for block in BLOCKS:
            if ids.numel() / experts / block < 0.9:
                break
        room = ids.numel() + experts * (block - 1)
        if ids.numel() < experts:
            room = min(ids.numel() * block, room)
        rows = torch.empty(room, dtype=torch.int32, device="cuda")
        owners = torch.empty(-(-room // block), dtype=torch.int32, device="cuda")
        padded = torch.empty(1, dtype=torch.int32, device="cuda")
        self.ops.moe_align_block_size(ids, experts, block, rows, owners, padded, None)
        return rows, owners, padded, block

    def call(self, shape: Shape, x: Any, weights: tuple, out: Any, aligned: tuple,
             scale: Any) -> None:  # fmt: skip
        """One grouped GEMM; x has a row a token (first projection) or a row a choice."""
        rows, owners, padded, block = aligned
        words, scales = weights
        self.ops.moe_wna16_marlin_gemm(
            x, out, words, None, scales, None, None, None, None, None, self.locks,
            rows, owners, padded, scale, block, len(out) // len(x), False, UINT4_BIAS8,
            len(x), shape.n, shape.k, True, False, True, False, -1, -1, -1,
        )  # fmt: skip

    def variants(self, shape: Shape, tokens: int, routes: list[Routing], weights: tuple) -> list:
        """See peers.Peer."""
        torch = self.torch
        choices = routes[0].ids.numel()
        x = torch.randn(tokens if shape.from_tokens else choices, shape.k, device="cuda").bfloat16()
        out = torch.empty(choices, shape.n, device="cuda", dtype=torch.bfloat16)
        scale = torch.ones(choices, device="cuda")
        aligned = [self.align(r, shape.experts) for r in routes]
        return [[lambda a=a: self.call(shape, x, weights, out, a, scale) for a in aligned]]

    def check(self) -> float:
        """Relative error where all weights of an expert are equal, so that no layout matters.

        Tells whether routing, experts, scales and sizes arrive where they should.
        """
        torch = self.torch
        worst = 0.0
        for tokens, first in ((1, True), (40, True), (40, False)):
            shape = Shape("up" if first else "down", 8, 256, 512)
            g = torch.Generator().manual_seed(tokens)
            ids = torch.rand(tokens, shape.experts, generator=g).topk(2, 1).indices.cuda()
            routing = Routing(ids, None, 0)
            nibble = torch.arange(shape.experts, device="cuda") + 3
            word = sum(nibble << 4 * i for i in range(8)).to(torch.int64)
            word = torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)
            words, scales = self.weights(shape)
            words[:] = word[:, None, None]
            scales[:] = (nibble / 64).bfloat16()[:, None, None]
            x = torch.randn(tokens if first else 2 * tokens, shape.k, device="cuda").bfloat16()
            out = torch.full((2 * tokens, shape.n), float("nan"), device="cuda").bfloat16()
            scale = torch.ones(2 * tokens, device="cuda")
            self.call(shape, x, (words, scales), out, self.align(routing, shape.experts), scale)
            value = ((nibble - 8) * (nibble / 64)).double()[ids.reshape(-1)]
            sums = x.double().sum(1)
            want = (sums.repeat_interleave(2) if first else sums) * value
            found = out.double() - want[:, None]
            worst = max(worst, (found.norm() / (want.norm() * shape.n**0.5)).item())
        return worst
