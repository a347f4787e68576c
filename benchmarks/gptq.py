# SPDX-License-Identifier: Apache-2.0
"""GPTQ (Frantar et al. 2022, arXiv 2210.17323) at 2 bits, to compare with; not part of the product.

Asymmetric four-level grids with a 16-bit scale and offset for 64 weights (2.5 bits a weight), their
ends searched for the least squared error when their group is reached; no reordering of the inputs.
"""

from __future__ import annotations

import numpy as np

GROUP = 64
LEVELS = 4
GPTQ_BITS = 2 + 32 / GROUP
DAMPING = 0.01
# Both ends of the grid are tried at these shares of the group's range around its middle.
SHARES = np.linspace(0.4, 1.0, 11)


def searched_grid(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset [N, 1] for x [N, 64]: those of the least squared error."""
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    middle = (low + high) / 2
    best = np.full((len(x), 1), np.inf)
    scale, offset = np.ones_like(low), low
    for a in SHARES:
        for b in SHARES:
            first, last = middle + a * (low - middle), middle + b * (high - middle)
            step = np.maximum((last - first) / (LEVELS - 1), 1e-30)
            q = np.clip(np.rint((x - first) / step), 0, LEVELS - 1)
            cost = np.square(first + q * step - x).sum(axis=1, keepdims=True)
            better = cost < best
            best = np.where(better, cost, best)
            scale, offset = np.where(better, step, scale), np.where(better, first, offset)
    return scale, offset


def gptq_int2(weight: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """The weights that a decoder would return for float32 [N, K] under a Hessian [K, K]."""
    w = weight.astype(np.float64)
    h = hessian / np.mean(np.diagonal(hessian))
    h[np.diag_indices_from(h)] += DAMPING
    # H = R R^T with R upper; its columns over its diagonal say how later weights follow errors.
    root = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    follow = root / np.diagonal(root)
    x, out = w.copy(), np.empty_like(w)
    for first in range(0, w.shape[1], GROUP):
        last = first + GROUP
        scale, offset = searched_grid(x[:, first:last])
        for j in range(first, last):
            q = np.clip(np.rint((x[:, j] - offset[:, 0]) / scale[:, 0]), 0, LEVELS - 1)
            out[:, j] = offset[:, 0] + q * scale[:, 0]
            error = w[:, j] - out[:, j]
            x[:, j + 1 : last] += error[:, None] * follow[j, j + 1 : last]
        x[:, last:] += (w[:, first:last] - out[:, first:last]) @ follow[first:last, last:]
    return out.astype(np.float32)
