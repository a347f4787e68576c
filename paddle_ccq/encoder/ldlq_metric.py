# SPDX-License-Identifier: Apache-2.0
"""The metric of calibrated encoding: the damped Hessian H and the factors that error feedback uses.

An output channel's error e = w - w' costs e H e^T on the calibration text. H is the Hessian of that
squared error: the mean of x x^T over the inputs x of the channel, its factor 2 left out. With
H = M D M^T (M unit block upper triangular, D block diagonal, blocks of the four weights that share
a byte)

    e H e^T = sum over b of z_b D_b z_b^T,      z_b = e_b + sum over a < b of e_a M_ab,

so going through the blocks in order, block b is best taken nearest to w_b + sum of e_a M_ab in the
metric D_b (LDLQ: Chee et al. 2023, arXiv 2307.13304, with blocks as in QuIP#, arXiv 2402.04396; for
blocks of one it is GPTQ's order of operations). D_b is what is left of H_bb once all later weights
have done their best to make up for block b.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK = 4


@dataclass(frozen=True)
class InputHessian:
    """The Hessian of one matrix, measured on a text.

    Attributes:
        matrix: mean of x x^T [K, K], rows in plain order; None if no token reached the matrix.
        tokens: the number of tokens that the mean is taken over.
    """

    matrix: np.ndarray | None
    tokens: int


@dataclass(frozen=True)
class LdlqMetric:
    """One matrix's metric, in the order in which its rows are stored; float32, C-contiguous.

    Attributes:
        h: damped Hessian [K, K], divided by the mean of its diagonal.
        feedback: transpose of M [K, K].
        d_root: upper R [K/4, 4, 4] with D_b = R R^T.
        h_root: upper R with H_bb = R R^T.
        h_inverse: inverses of H_bb.
    """

    h: np.ndarray
    feedback: np.ndarray
    d_root: np.ndarray
    h_root: np.ndarray
    h_inverse: np.ndarray

    def as_dict(self) -> dict[str, np.ndarray]:
        """For the compiled core."""
        return dict(vars(self))


def upper_root(matrix: np.ndarray) -> np.ndarray:
    """Upper triangular R with R R^T = matrix, for one matrix or a stack: Cholesky from the end."""
    lower = np.linalg.cholesky(matrix[..., ::-1, ::-1])
    return lower[..., ::-1, ::-1]


def blocks_of(matrix: np.ndarray) -> np.ndarray:
    """The diagonal blocks [K/4, 4, 4] of a matrix [K, K]."""
    count = matrix.shape[0] // BLOCK
    index = np.arange(count)
    return matrix.reshape(count, BLOCK, count, BLOCK)[index, :, index, :]


def damped(hessian: np.ndarray, damping: float) -> np.ndarray | None:
    """A Hessian [K, K] over the mean of its diagonal, symmetric and with damping, in float64.

    `damping` is added to the diagonal: it keeps the factors finite where inputs are few or
    dependent, and lets a direction that the text has not shown still count. None where no input
    was ever other than zero.
    """
    h = np.array(hessian, np.float64)
    mean = float(np.mean(np.diagonal(h)))
    if not mean > 0:
        return None
    h /= mean
    h = (h + h.T) / 2
    h[np.diag_indices_from(h)] += damping
    return h


def make_metric(hessian: np.ndarray, damping: float) -> LdlqMetric | None:
    """The metric of a Hessian [K, K] (see damped), or None where no input was other than zero."""
    h = damped(hessian, damping)
    if h is None:
        return None
    root = upper_root(h)
    d_root = blocks_of(root)
    # Columns of block b, times the inverse of the block on the diagonal: M.
    count = h.shape[0] // BLOCK
    columns = root.reshape(h.shape[0], count, BLOCK).transpose(1, 0, 2)
    m = (columns @ np.linalg.inv(d_root)).transpose(1, 0, 2).reshape(h.shape)
    own = blocks_of(h)

    def single(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array, np.float32)

    return LdlqMetric(
        h=single(h),
        feedback=single(m.T),
        d_root=single(d_root),
        h_root=single(upper_root(own)),
        h_inverse=single(np.linalg.inv(own)),
    )


def weighted_error(error: np.ndarray, hessian: np.ndarray) -> float:
    """tr(E H E^T) for rows E [N, K] in float64."""
    e = error.astype(np.float64)
    return float(np.sum((e @ hessian) * e))
