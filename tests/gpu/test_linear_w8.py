# SPDX-License-Identifier: Apache-2.0
"""The product with 8-bit weights on a GPU: results off float64, unwritten, or that move.

Needs torch, a GPU and the library where paddle_ccq.ops.gpu_library finds it. Skipped otherwise.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
import torch

from paddle_ccq.ops import gpu_library
from paddle_ccq.vllm import torch_ops
from paddle_ccq.vllm.layout import product_units

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not gpu_library.available(), reason="no GPU or no library"
)

# Slices of K that are not equal or empty, and tiles that n does not fill; the last, whose digits
# do not fit into shared memory, is another kernel's from 17 rows on.
SHAPES = [(64, 16), (128, 48), (192, 144), (512, 768), (1088, 1040), (3584, 1040), (8192, 4224)]
SHAPES += [(28672, 528)]
LIMIT = torch_ops.LINEAR_ROWS
ROWS = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 32, 33, 47, 48, 49, 63, 64, 65, 100, LIMIT, LIMIT + 1, 300]


# The distance between bfloat16 numbers, relative to the smaller: twice the largest error.
ROUNDING = 2.0**-8


def check(found: torch.Tensor, x: torch.Tensor, states: torch.Tensor, scale: torch.Tensor) -> None:
    """Each row's error, against float64, is at most what the kernels round.

    The result is rounded to bfloat16 once, which moves a row by at most half of 2^-8. Above LIMIT
    rows decoded weights are rounded too: independent errors, which add up as squares do, and are
    large beside a sum of few columns that happens to be small.
    """
    weights = (states.double() - 128) * scale.double()[:, None]
    wanted = x.double() @ weights.t()
    errors, allowed = (found.double() - wanted).norm(dim=1), ROUNDING * wanted.norm(dim=1)
    if len(x) > LIMIT:
        # A weight's error has a standard deviation of at most ROUNDING / 2 / sqrt(3) of it.
        each = (x.double() ** 2 @ (weights**2).t()).sum(dim=1).sqrt()
        allowed += 3 * ROUNDING / 12**0.5 * each
    assert bool((errors < allowed).all()), float((errors / allowed).max())


@pytest.mark.parametrize("k,n", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_products_are_float64s(k: int, n: int, rows: int) -> None:
    torch.manual_seed(rows * n)
    states = torch.randint(1, 256, (n, k), dtype=torch.uint8, device="cuda")
    scale = (torch.rand(n, device="cuda") * 0.01 + 0.001).to(torch.bfloat16)
    units = product_units(states).contiguous()
    counters = torch.zeros(torch_ops.counters_of(n), dtype=torch.int32, device="cuda")
    x = torch.randn((rows, k), device="cuda").to(torch.bfloat16)
    x[0] *= 1000  # rows of other sizes are none of a row's business
    found = torch_ops.linear_w8(x, units, scale, counters)
    check(found, x, states, scale)
    assert torch.equal(found, torch_ops.linear_w8(x, units, scale, counters))
    assert not counters.any()


@pytest.mark.parametrize("rows", [4, 12, 30, 60])
def test_a_row_that_is_not_finite_leaves_others_alone(rows: int) -> None:
    states = torch.randint(1, 256, (768, 512), dtype=torch.uint8, device="cuda")
    scale = torch.full((768,), 0.01, dtype=torch.bfloat16, device="cuda")
    counters = torch.zeros(torch_ops.counters_of(768), dtype=torch.int32, device="cuda")
    x = torch.randn((rows, 512), device="cuda").to(torch.bfloat16)
    x[1, 5], x[3, 100] = float("inf"), float("nan")
    found = torch_ops.linear_w8(x, product_units(states).contiguous(), scale, counters)
    finite = found.isfinite().all(dim=1).tolist()
    assert [i for i in range(rows) if not finite[i]] == [1, 3]


def test_many_rows_meet_weights_that_are_decoded_part_by_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = torch.randint(1, 256, (1040, 512), dtype=torch.uint8, device="cuda")
    scale = (torch.rand(1040, device="cuda") * 0.01 + 0.001).to(torch.bfloat16)
    counters = torch.zeros(torch_ops.counters_of(1040), dtype=torch.int32, device="cuda")
    x = torch.randn((LIMIT + 7, 512), device="cuda").to(torch.bfloat16)
    monkeypatch.setattr(torch_ops, "DECODED_BYTES", 512 * 1024)  # 512 columns a part
    found = torch_ops.linear_w8(x, product_units(states).contiguous(), scale, counters)
    check(found, x, states, scale)
