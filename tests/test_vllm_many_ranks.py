# SPDX-License-Identifier: Apache-2.0
"""Experts cut for four, eight and sixteen ranks by the classes that vLLM runs; where it is."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

import torch

from paddle_ccq.codec import formats
from paddle_ccq.vllm import cpu_experts, gpu_experts
from paddle_ccq.vllm.expert_sizes import expert_bytes
from paddle_ccq.vllm.experts import PROJECTIONS

FORMATS = ["wint2", "ccq-2t", "ccq-2.5", "ccq-2.75", "wint4"]
HIDDEN = 256


def moe_of(rank: int, ranks: int) -> SimpleNamespace:
    parallel = SimpleNamespace(use_all2all_kernels=False, tp_rank=rank, tp_size=ranks)
    return SimpleNamespace(moe_parallel_config=parallel)


def gpu_method(format: str, rank: int = 0, ranks: int = 1):
    arguments = (moe_of(rank, ranks), "experts", False)
    if format == "wint2":
        return gpu_experts.Wint2ExpertsMethod(*arguments, "plain")
    if format == "ccq-2t":
        return gpu_experts.TrellisExpertsMethod(*arguments)
    if format == "wint4":
        return gpu_experts.Wint4ExpertsMethod(*arguments)
    return gpu_experts.SpareExpertsMethod(*arguments, format)


def stored(format: str, k: int, n: int) -> dict[str, torch.Tensor]:
    """Random stored tensors of one matrix [k, n]."""
    rng, result = np.random.default_rng(7), {}
    for suffix, (shape, dtype) in formats.tensor_specs(format, k, n).items():
        if dtype in ("BF16", "F32"):
            value = torch.from_numpy(rng.uniform(0.5, 2, shape).astype(np.float32))
            result[suffix] = value.to(torch.bfloat16) if dtype == "BF16" else value
        else:
            made = rng.integers(-128, 128, shape).astype(np.int8)
            kind = {"I8": np.int8, "U8": np.uint8, "I16": np.int16}[dtype]
            raw = rng.integers(0, 1 << 15, shape).astype(kind) if dtype == "I16" else made
            result[suffix] = torch.from_numpy(raw.astype(kind))
    return result


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("width", [128, 512, 1024])
def test_a_layer_allocates_what_the_check_counts(format: str, width: int) -> None:
    experts = 3
    layer, method = torch.nn.Module(), gpu_method(format)
    method.create_weights(layer, experts, HIDDEN, width, torch.bfloat16)
    held = sum(p.numel() * p.element_size() for p in layer.parameters())
    counted = [expert_bytes(format, *method.shape_of(part)) for part in PROJECTIONS]
    assert held == experts * sum(counted)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_parts_of_many_ranks_are_the_whole(format: str, ranks: int) -> None:
    """Every stored byte is on the rank that it belongs to; a column's tensors are on all."""
    width = 128 * ranks
    for part, (k, n) in {"up_gate": (HIDDEN, 2 * width), "down": (width, HIDDEN)}.items():
        tensors = stored(format, k, n)
        cuts = []
        for rank in range(ranks):
            method = gpu_method(format, rank, ranks)
            layer = torch.nn.Module()
            method.create_weights(layer, 1, HIDDEN, 128, torch.bfloat16)
            method.device = lambda: torch.device("cpu")
            cuts.append(method.cut(part, tensors))
        # wint4 is cut as states [n, k], whatever the order of its bytes.
        whole = gpu_method(format)
        whole.create_weights(torch.nn.Module(), 1, HIDDEN, width, torch.bfloat16)
        whole.device = lambda: torch.device("cpu")
        wanted = whole.cut(part, tensors)
        for suffix, value in wanted.items():
            own = [cut[suffix] for cut in cuts]
            if suffix == "before":  # of CCQ-2T, the byte before a rank's first
                rows = k // 4 // ranks if part == "down" else 0
                for rank, bytes_ in enumerate(own):
                    if part == "up_gate" or rank == 0:
                        assert not bytes_.any()
                    else:
                        assert torch.equal(bytes_, tensors["quant_weight"][rank * rows - 1])
                continue
            if part == "down":
                joined = own[0] if value.ndim == 1 else torch.cat(own, dim=int(format == "wint4"))
                assert all(torch.equal(o, own[0]) for o in own) or value.ndim > 1
            else:
                axis = 0 if format == "wint4" else value.ndim - 1
                halves = [o.chunk(2, dim=axis) for o in own]
                joined = torch.cat([h[i] for i in (0, 1) for h in halves], dim=axis)
            assert torch.equal(joined, value), (part, suffix)


@pytest.mark.parametrize("ranks", [4, 8])
def test_a_rank_of_whole_experts_takes_its_own(ranks: int) -> None:
    """Of experts shared out whole, each rank keeps its own; none is kept twice or by nobody."""
    experts, seen = 2 * ranks, []
    tensors = {part: stored("wint2", HIDDEN, 256) for part in ("up_gate",)}
    tensors["down"] = stored("wint2", 128, HIDDEN)
    for rank in range(ranks):
        first = rank * experts // ranks
        mapping = torch.full((experts,), -1)
        mapping[first : first + 2] = torch.arange(2)
        layer = SimpleNamespace(expert_map=mapping)
        method = cpu_experts.CpuCodedExpertsMethod(moe_of(0, 1), "e", False, "wint2", "plain")
        method.create_weights(layer, 2, HIDDEN, 128, torch.bfloat16)
        assert len(method.missing(layer)) == 4
        for expert in range(experts):
            for part, found in tensors.items():
                for suffix, value in found.items():
                    method.place(layer, expert, part, suffix, value, f"{expert}.{part}.{suffix}")
        assert not method.missing(layer) and not method.pending
        ids = method.choices(layer, torch.arange(experts)[None])
        seen += [expert for expert in range(experts) if ids[0, expert] >= 0]
    assert seen == list(range(experts))
