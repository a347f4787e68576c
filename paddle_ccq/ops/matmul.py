# SPDX-License-Identifier: Apache-2.0
"""Products with packed weights on the CPU: one matrix, grouped over experts, and the MoE block.

Weights are decoded on the fly, exactly. Activations enter as 16-bit integers with one scale per
token and 64 rows, in two steps where an outlier would leave the others few bits: each is off by at
most 2^-12 of its group's mean magnitude, 2e-5 of the output's norm on Gaussian rows (a bfloat16
output alone costs 1.6e-3). Sums are exact inside a group and float32 across groups, in a fixed
order, so a token's result depends neither on the other tokens nor on threads or instruction set.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..codec.row_order import ROW_ORDERS
from ..compiled import core as _core
from . import checks
from .packed import PackedExperts, PackedMatrix, same_shape

# As the core takes them; made once, since a small product is quicker than the list.
_ORDERS = {name: checks.row_order(name).tolist() for name in ROW_ORDERS}


def _multiply(
    x: np.ndarray,
    matrices: Sequence[PackedMatrix],
    ends: list[int],
    fine: bool,
    threads: int,
    isa: str,
) -> np.ndarray:
    """float32 [rows, N] of checked arguments."""
    order = _ORDERS[matrices[0].row_order]
    cores = [m.core for m in matrices]
    x = x.astype(np.float32, copy=False)
    return _core.multiply(x, cores, ends, order, fine, threads, isa)


def linear(
    x: np.ndarray,
    weight: PackedMatrix,
    threads: int | None = None,
    isa: str = "auto",
    fine: bool = False,
) -> np.ndarray:
    """ccq_linear: x [M, K] @ weight [K, N] -> [M, N] in x's dtype, for any M.

    `isa` pins an instruction set (tests). With `fine` every activation gets the second step, 31
    bits in all: what is left is float32's own rounding, for up to twice the arithmetic.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if not isinstance(weight, PackedMatrix):
        raise ValueError(f"weight must be a PackedMatrix (see repack), got {type(weight).__name__}")
    x = checks.activations(x, "x", weight.k)
    y = _multiply(x, [weight], [len(x)], fine, checks.threads(threads), isa)
    return y.astype(x.dtype, copy=False)


def moe_gemm(
    x: np.ndarray,
    experts: Sequence[PackedMatrix],
    offsets: np.ndarray,
    threads: int | None = None,
    isa: str = "auto",
) -> np.ndarray:
    """ccq_moe_gemm: rows of x [T, K], sorted by expert, each times its expert's matrix -> [T, N].

    Args:
        x: float32, bfloat16 or float16.
        experts: one matrix an expert, all of one shape.
        offsets: int32 or int64 [experts], the running count of rows: expert e has the rows
            offsets[e-1] .. offsets[e] (FastDeploy's tokens_expert_prefix_sum).

    Raises:
        ValueError: naming the argument that does not fit.
    """
    matrices = same_shape(experts, "experts")
    x = checks.activations(x, "x", matrices[0].k)
    ends = checks.offsets(offsets, len(matrices), len(x))
    y = _multiply(x, matrices, ends, False, checks.threads(threads), isa)
    return y.astype(x.dtype, copy=False)


def _ffn(
    x: np.ndarray, experts: PackedExperts, ends: list[int], fine: bool, threads: int, isa: str
) -> np.ndarray:
    up = _multiply(x, experts.up_gate, ends, fine, threads, isa)
    # float32 between the two products: rounding to x's dtype would only lose.
    return _multiply(_core.swiglu(up, threads), experts.down, ends, fine, threads, isa)


def moe_ffn(
    x: np.ndarray,
    experts: PackedExperts,
    offsets: np.ndarray,
    threads: int | None = None,
    isa: str = "auto",
) -> np.ndarray:
    """ccq_moe_ffn: down(silu(gate(x)) * up(x)) of rows sorted by expert, [T, hidden] -> the same.

    Arguments as moe_gemm; the middle stays float32.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check_experts(experts)
    x = checks.activations(x, "x", experts.hidden)
    ends = checks.offsets(offsets, len(experts), len(x))
    return _ffn(x, experts, ends, False, checks.threads(threads), isa).astype(x.dtype, copy=False)


def moe(
    x: np.ndarray,
    experts: PackedExperts,
    topk_ids: np.ndarray,
    topk_weights: np.ndarray,
    threads: int | None = None,
    isa: str = "auto",
    fine: bool = False,
) -> np.ndarray:
    """ccq_moe: sum over j of topk_weights[m, j] * ffn of expert topk_ids[m, j] on x[m].

    Args:
        x: [M, hidden] of float32, bfloat16 or float16.
        topk_ids: int32 or int64 [M, top_k], each in 0..experts-1.
        topk_weights: float32 [M, top_k], used as they are (not renormalised).
        fine: as in linear().

    Summed in float32, j = 0 first.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check_experts(experts)
    x = checks.activations(x, "x", experts.hidden)
    ids, weights = checks.array(topk_ids, "topk_ids"), checks.array(topk_weights, "topk_weights")
    if ids.dtype not in (np.int32, np.int64) or ids.ndim != 2 or len(ids) != len(x):
        raise ValueError(
            f"topk_ids must be int32 or int64 [{len(x)}, top_k], got {ids.dtype}{list(ids.shape)}"
        )
    if ids.size and (ids.min() < 0 or ids.max() >= len(experts)):
        raise ValueError(f"topk_ids must lie in 0..{len(experts) - 1}")
    if weights.dtype != np.float32 or weights.shape != ids.shape:
        raise ValueError(
            f"topk_weights must be float32{list(ids.shape)}, "
            f"got {weights.dtype}{list(weights.shape)}"
        )
    top_k = ids.shape[1]
    flat = ids.reshape(-1)
    # Stable: tokens of one expert stay in order, so the layout is the same on every run.
    order = np.argsort(flat, kind="stable")
    ends = np.cumsum(np.bincount(flat, minlength=len(experts))).tolist()
    rows = _ffn(x[order // max(top_k, 1)], experts, ends, fine, checks.threads(threads), isa)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    place = place.reshape(ids.shape)
    y = np.zeros((len(x), experts.hidden), np.float32)
    for j in range(top_k):
        y += weights[:, j, None] * rows[place[:, j]]
    return y.astype(x.dtype, copy=False)


def _check_experts(experts: object) -> None:
    if not isinstance(experts, PackedExperts):
        raise ValueError(
            f"experts must be PackedExperts (see repack_experts), got {type(experts).__name__}"
        )
