# SPDX-License-Identifier: Apache-2.0
"""The Hessian of a matrix' squared output error: sums of x x^T over tokens, in a fixed order."""

from __future__ import annotations

from concurrent.futures import Executor

import numpy as np
import paddle

# Tokens summed in float32; sums of such parts are taken in float64.
TOKENS_A_PART = 8192
# Rows of the result that one task computes, from the diagonal on.
ROWS_A_TASK = 256


@paddle.no_grad()
def hessian_sum(x: np.ndarray, pool: Executor | None = None) -> np.ndarray:
    """sum over tokens of x x^T for x [tokens, K]: float64 [K, K], exactly symmetric.

    Every part is one product on one core, so the result is the same for any number of threads. As
    usual in this field the factor 2 of the second derivative is left out.
    """
    k = x.shape[1]
    total = np.zeros((k, k))
    starts = list(range(0, k, ROWS_A_TASK))
    for first in range(0, len(x), TOKENS_A_PART):
        part = paddle.to_tensor(np.ascontiguousarray(x[first : first + TOKENS_A_PART]))

        def rows(row: int, part: paddle.Tensor = part) -> None:
            last = min(row + ROWS_A_TASK, k)
            product = paddle.matmul(part[:, row:last], part[:, row:], transpose_x=True)
            total[row:last, row:] += product.numpy()

        list(pool.map(rows, starts)) if pool else [rows(row) for row in starts]
    lower = np.tril_indices(k, -1)
    total[lower] = total.T[lower]
    return total


def shrink(
    own: np.ndarray, tokens: int, pooled: np.ndarray, pooled_tokens: int, weight: int
) -> np.ndarray:
    """Mean of x x^T [K, K], mixed with the pool's mean as if that were `weight` more tokens."""
    if not weight:
        return own / tokens
    return (own + pooled * (weight / pooled_tokens)) / (tokens + weight)
