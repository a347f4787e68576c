# SPDX-License-Identifier: Apache-2.0
"""The metric of calibrated ccq-2t: factors of the damped Hessian, whole and window by window.

ldlq_metric.py tells what the factorization H = M D M^T by blocks of four rows is for. Here D_b is
kept as unit_b * R_b R_b^T with the mean square of R_b's columns 1/4, so that the code's values in
the metric, v R_b, are integers of half their own size once they are rounded.

Sweeps search a group of 64 rows anew. Its last byte takes part in the four weights of the next
byte, so what is searched is a window of 68 rows, whose own block of H is factored for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..codec.convolution import GROUP
from .ldlq_metric import BLOCK, blocks_of, damped, upper_root

WINDOW = GROUP + BLOCK


@dataclass(frozen=True)
class TrellisMetric:
    """One matrix's metric; float32, C-contiguous.

    Attributes:
        h: damped Hessian [K, K], divided by the mean of its diagonal.
        m: M [K, K], unit block upper triangular.
        root, unit, ratio: R_b [K/4, 4, 4], unit_b [K/4], and unit_(b-1) / unit_b [K/4].
        spread: geometric over arithmetic mean of the eigenvalues of D_b [K/4]; a good code's
            costs, and with them the beam, go with it.
        window_...: the same of each group's window, [K/64, 68, 68], [K/64, 17, 4, 4] and
            [K/64, 17]; the last group's window has 64 rows.
        window_inverse: inverse of each window's block of H, [K/64, 68, 68].
    """

    h: np.ndarray
    m: np.ndarray
    root: np.ndarray
    unit: np.ndarray
    ratio: np.ndarray
    spread: np.ndarray
    window_m: np.ndarray
    window_root: np.ndarray
    window_unit: np.ndarray
    window_ratio: np.ndarray
    window_spread: np.ndarray
    window_inverse: np.ndarray

    def as_dict(self) -> dict[str, np.ndarray]:
        """For the compiled core."""
        return dict(vars(self))


def factors(h: np.ndarray) -> tuple[np.ndarray, ...]:
    """M, R, unit, ratio and spread of one matrix or a stack [..., K, K], in float64."""
    root = upper_root(h)
    count = h.shape[-1] // BLOCK
    flat = root.reshape(-1, *h.shape[-2:])
    d_root = np.stack([blocks_of(r) for r in flat])
    # Columns of block b, times the inverse of the block on the diagonal.
    columns = flat.reshape(len(flat), -1, count, BLOCK).swapaxes(1, 2)
    m = (columns @ np.linalg.inv(d_root)).swapaxes(1, 2).reshape(h.shape)
    # trace(R R^T) is 4 * 1/4.
    unit = np.square(d_root).sum(axis=(-2, -1))
    d_root = d_root / np.sqrt(unit)[..., None, None]
    ratio = np.ones(unit.shape)
    ratio[:, 1:] = unit[:, :-1] / unit[:, 1:]
    # The eigenvalues of R R^T sum to 1.
    spread = 4 * np.sqrt(np.prod(np.diagonal(d_root, axis1=-2, axis2=-1), axis=-1))
    lead = h.shape[:-2]
    return (
        m,
        d_root.reshape(*lead, count, BLOCK, BLOCK),
        unit.reshape(*lead, count),
        ratio.reshape(*lead, count),
        spread.reshape(*lead, count),
    )


def make_trellis_metric(hessian: np.ndarray, damping: float) -> TrellisMetric | None:
    """The metric of a Hessian [K, K] (see ldlq_metric.make_metric), or None for one of zeros."""
    h = damped(hessian, damping)
    if h is None:
        return None
    k = h.shape[0]
    groups = k // GROUP
    own = np.zeros((groups, WINDOW, WINDOW))
    parts = (np.zeros_like(own), np.zeros((groups, WINDOW // BLOCK, BLOCK, BLOCK)))
    parts += tuple(np.ones((groups, WINDOW // BLOCK)) for _ in range(3))
    inverse = np.zeros_like(own)
    for rows, chosen in ((WINDOW, slice(0, groups - 1)), (GROUP, slice(groups - 1, groups))):
        blocks = [
            h[GROUP * g : GROUP * g + rows, GROUP * g : GROUP * g + rows]
            for g in range(chosen.start, chosen.stop)
        ]
        if not blocks:
            continue
        stack = np.stack(blocks)
        m, *others = factors(stack)
        parts[0][chosen, :rows, :rows] = m
        for part, found in zip(parts[1:], others, strict=True):
            part[chosen, : rows // BLOCK] = found
        inverse[chosen, :rows, :rows] = np.linalg.inv(stack)
    arrays = (h, *factors(h), *parts, inverse)
    return TrellisMetric(*(np.ascontiguousarray(a, np.float32) for a in arrays))
