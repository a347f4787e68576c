# SPDX-License-Identifier: Apache-2.0
"""Products of few rows of experts with 4-bit weights on a GPU, and the whole block of experts.

Needs torch, a GPU and the library where paddle_ccq.ops.gpu_library finds it. Skipped otherwise.
"""

from __future__ import annotations

import ctypes

import pytest

pytest.importorskip("torch")
import torch

from paddle_ccq.ops import gpu_abi, gpu_library
from paddle_ccq.vllm import torch_ops

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not gpu_library.available(), reason="no GPU or no library"
)

SHAPES = [(1, 64, 16), (3, 128, 48), (8, 256, 512), (5, 1088, 80), (70, 3584, 144), (16, 8192, 528)]


def made(experts: int, k: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randint(0, 256, (experts, n, k // 2), dtype=torch.uint8, device="cuda")
    scale = (torch.rand((experts, n, 1), device="cuda") * 0.01 + 0.001).to(torch.bfloat16)
    return weight, scale.repeat(1, 1, max(1, k // 128)).contiguous()


def decoded(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float64 [experts, n, k]."""
    states = torch.stack([weight & 15, weight >> 4], -1).flatten(-2).double() - 8
    return states * scale[:, :, :1].double()


@pytest.mark.parametrize("experts,k,n", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 9, 40, 150])
@pytest.mark.parametrize("tokens", [4, 64])
def test_rows_meet_their_own_expert(experts: int, k: int, n: int, rows: int, tokens: int) -> None:
    torch.manual_seed(rows * n)
    weight, scale = made(experts, k, n)
    ids = torch.randint(0, experts, (rows,), device="cuda").sort()[0]
    ids = ids if rows != 9 else torch.full_like(ids, experts - 1)
    ends = torch.bincount(ids, minlength=experts).cumsum(0)
    x = torch.randn((rows + 2, k), device="cuda").to(torch.bfloat16)  # two of no expert
    x[0] *= 100
    wanted = torch.einsum("rk,rnk->rn", x[:rows].double(), decoded(weight, scale)[ids])
    found = []
    for _ in range(3):
        out = torch.full((rows + 2, n), float("nan"), dtype=torch.bfloat16, device="cuda")
        arguments = gpu_abi.W4Args(
            x.data_ptr(), ends.data_ptr(), weight.data_ptr(), scale.data_ptr(), out.data_ptr(),
            len(x), k, n, experts, scale.shape[2], tokens,
        )  # fmt: skip
        library = torch_ops.library()
        stream = torch.cuda.current_stream().cuda_stream
        assert library.ccq_w4_gemm(ctypes.byref(arguments), stream) == 0
        found.append(out)
    assert bool(found[0][rows:].isnan().all())
    errors = (found[0][:rows].double() - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert float(errors.max()) < 4e-3
    assert all(torch.equal(out[:rows], found[0][:rows]) for out in found)


def test_decoded_weights_are_states_times_scales() -> None:
    weight, scale = made(2, 3584, 144)
    out = torch.full((144, 3584), float("nan"), dtype=torch.bfloat16, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    status = torch_ops.library().ccq_dequant_w4(
        weight[1].data_ptr(), scale[1].data_ptr(), scale.shape[2], 3584, 144, out.data_ptr(), stream
    )
    assert status == 0
    assert torch.equal(out, decoded(weight, scale)[1].float().to(torch.bfloat16))


@pytest.mark.parametrize("tokens", [1, 7, 64, 1100])
def test_the_block_of_experts(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(tokens)
    monkeypatch.setattr(torch_ops, "MOE_TOKENS", 700)
    experts, hidden, width = 8, 512, 256
    up_gate, down = made(experts, hidden, 2 * width), made(experts, width, hidden)
    x = torch.randn((tokens, hidden), device="cuda").to(torch.bfloat16)
    ids = torch.stack([torch.randperm(experts, device="cuda")[:3] for _ in range(tokens)])
    ids[0, 0] = -1  # of another card
    weights = torch.rand((tokens, 3), device="cuda")
    assert torch_ops.serves_w4(tokens)
    found = torch_ops.experts_w4(x, weights, ids, list(up_gate), list(down))
    first, second, wanted = decoded(*up_gate), decoded(*down), torch.zeros_like(x).double()
    for token in range(tokens):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            if expert < 0:
                continue
            both = first[expert] @ x[token].double()
            middle = torch.nn.functional.silu(both[:width]) * both[width:]
            wanted[token] += weight * (second[expert] @ middle)
    assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-2
