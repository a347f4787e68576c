# SPDX-License-Identifier: Apache-2.0
"""The router's product on a GPU: scores off float64, or that depend on their neighbours.

Needs torch, a GPU of compute capability 9.0 and the library where paddle_ccq.ops.gpu_library finds
it. Skipped otherwise.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
import torch

from paddle_ccq.ops import gpu_library
from paddle_ccq.vllm import torch_ops

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability() < (9, 0)
    or not gpu_library.available(),
    reason="no GPU of compute capability 9.0 or no library",
)


def parts_of(weight: torch.Tensor) -> torch.Tensor:
    first = weight.to(torch.bfloat16)
    second = (weight - first.float()).to(torch.bfloat16)
    return torch.stack([first, second, (weight - first.float() - second.float()).bfloat16()])


@pytest.mark.parametrize("k,experts", [(64, 16), (192, 32), (2560, 64), (8192, 64), (16448, 160)])
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 17, 33, 64, 65, 1000])
def test_scores_are_float64s(k: int, experts: int, rows: int) -> None:
    torch.manual_seed(rows * k)
    weight = torch.randn((experts, k), device="cuda") * 0.02
    x = torch.randn((rows, k), device="cuda").to(torch.bfloat16)
    found = torch_ops.router(x, parts_of(weight), weight)
    wanted = x.double() @ weight.double().t()
    errors = (found.double() - wanted).norm(dim=1) / wanted.norm(dim=1)
    # Above 64 rows by cuBLAS, whose sums lose a little more; bfloat16 weights would be 2e-3 off.
    assert found.dtype == torch.float32 and float(errors.max()) < (2e-5 if rows <= 64 else 5e-5)
    for again in (x, x[:1]):
        other = torch_ops.router(again, parts_of(weight), weight)
        if rows <= 64:
            assert torch.equal(other, found[: len(again)])
