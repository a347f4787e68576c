# SPDX-License-Identifier: Apache-2.0
"""Humming's grouped GEMM (the package humming-kernels), which compiles itself where it runs.

Weights of 2 bits with a scale for 64, and of 4 bits with a scale for 128. It has no tuner; besides
its own choice of tiles for a number of rows, those for half and for twice as many are tried, and
the fastest counts. Of its interfaces for many experts the one for rows sorted by expert does the
same work as ours (the other one, which fetches rows through an index, was slower from 1024 tokens
on).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ccqlib
from measure import Routing, Shape

INTERFACE = "grouped_contiguous"
FORMATS = {"humming-int2": (2, 64), "humming-int4": (4, 128)}
NEIGHBOURS = (1.0, 0.5, 2.0)


class Humming:
    """One format of it.

    Attributes:
        who: key of FORMATS.
        tolerance: weights times scales are rounded to bfloat16, as outputs are.
    """

    tolerance = 3.5e-3

    def __init__(self, torch: Any, who: str) -> None:
        from humming import ops, transform
        from humming.kernel.humming import HummingKernel
        from humming.schema import HummingWeightSchema
        from humming.tune import get_heuristics_config

        self.torch, self.who = torch, who
        self.bits, self.group = FORMATS[who]
        self.launch, self.transform = ops.launch_kernel, transform
        self.kernels, self.heuristics = HummingKernel, get_heuristics_config
        self.schema = HummingWeightSchema(
            b_dtype=f"uint{self.bits}", weight_scale_group_size=self.group
        )
        self.locks = torch.zeros(2048, dtype=torch.int32, device="cuda")

    def stored(self, shape: Shape) -> dict[str, Any]:
        """Random codes, least significant first along K, and their scales."""
        torch = self.torch
        size = (shape.experts, shape.n, shape.k * self.bits // 32)
        codes = torch.randint(-(2**31), 2**31 - 1, size, dtype=torch.int32, device="cuda")
        scales = torch.rand(shape.experts, shape.n, shape.k // self.group, device="cuda")
        return {"weight": codes, "weight_scale": ((scales + 0.5) / 100).bfloat16()}

    def weights(self, shape: Shape) -> tuple[Any, dict[str, Any]]:
        return self.prepared(shape, self.stored(shape))

    def config(self, shape: Shape) -> Any:
        return self.transform.prepare_layer_config(
            shape.n, shape.k, self.schema, num_experts=shape.experts,
            torch_dtype=self.torch.bfloat16,
        )  # fmt: skip

    def prepared(self, shape: Shape, stored: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        config = self.config(shape)
        return config, self.transform.transform_humming_tensors(config, stored)

    def chosen(self, config: Any, rows: int) -> Any:
        """The kernel that its own choice takes for so many rows, compiled."""
        tuning = self.heuristics(config, shape_m=rows, gemm_type=INTERFACE)
        return self.kernels.prepare_kernels(config.to_str(), {"gemm_type": INTERFACE}, tuning)

    def compile(self, cases: Iterable[tuple[Shape, int]]) -> None:
        """Kernels of (shape, rows), side by side; afterwards they are there at once."""
        every = {(shape, max(1, int(rows * by))) for shape, rows in cases for by in NEIGHBOURS}
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(lambda case: self.chosen(self.config(case[0]), case[1]), every))

    def variants(self, shape: Shape, tokens: int, routes: list[Routing], weights: tuple) -> list:
        torch = self.torch
        config, tensors = weights
        rows = routes[0].ids.numel()
        x = torch.randn(rows, shape.k, device="cuda").bfloat16()
        out = torch.full((rows, shape.n), float("nan"), device="cuda", dtype=torch.bfloat16)
        kernels = {  # the same object where the choice is the same
            id(kernel): kernel
            for kernel in (self.chosen(config, max(1, int(rows * by))) for by in NEIGHBOURS)
        }
        ends = [torch.nn.functional.pad(r.offsets, (1, 0)) for r in routes]
        return [
            [lambda e=e, k=kernel: self.call(k, x, out, e, tensors) for e in ends]
            for kernel in kernels.values()
        ]

    def call(self, kernel: Any, x: Any, out: Any, ends: Any, tensors: dict[str, Any]) -> None:
        """One product; ends: int64 [experts + 1], sums of rows."""
        self.launch(
            configs=kernel, inputs=x, outputs=out, locks=self.locks, top_k=1, expert_layout=ends,
            **tensors,
        )  # fmt: skip

    def decode(self, stored: dict[str, Any], expert: int) -> Any:
        """float64 [K, N] of one expert."""
        torch = self.torch
        words, scales = (stored[k][expert] for k in ("weight", "weight_scale"))
        shifts = torch.arange(0, 32, self.bits, device="cuda", dtype=torch.int32)
        codes = (words[:, :, None] >> shifts) & (2**self.bits - 1)
        codes = codes.reshape(len(words), -1).double() - 2 ** (self.bits - 1)
        return (codes * scales.double().repeat_interleave(self.group, 1)).T

    def check(self) -> float:
        torch, worst = self.torch, 0.0
        shape = Shape("check", 5, 512, 1024)
        stored = self.stored(shape)
        config, tensors = self.prepared(shape, dict(stored))
        for rows in (3, 40, 700):
            offsets = ccqlib.random_offsets(torch, shape.experts, rows, rows).cuda()
            x = torch.randn(rows, shape.k, device="cuda").bfloat16()
            want = torch.empty(rows, shape.n, device="cuda", dtype=torch.float64)
            begin = 0
            for expert, end in enumerate(offsets.tolist()):
                want[begin:end] = x[begin:end].double() @ self.decode(stored, expert)
                begin = end
            out = torch.full_like(want, float("nan")).bfloat16()
            ends = torch.nn.functional.pad(offsets, (1, 0))
            self.call(self.chosen(config, rows), x, out, ends, tensors)
            worst = max(worst, ((out.double() - want).norm() / want.norm()).item())
        return worst
