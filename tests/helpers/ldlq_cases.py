# SPDX-License-Identifier: Apache-2.0
"""Matrices and Hessians for the calibrated search."""

from __future__ import annotations

import numpy as np

from paddle_ccq.encoder import ldlq
from paddle_ccq.encoder.ldlq_metric import make_metric

SMALL = ldlq.LdlqRecipe(code_pairs=3, keep_pairs=2, window=(-1, 1), sweeps=2)
KINDS = ["correlated", "low rank", "few tokens", "dead inputs"]


def hessian(k: int, kind: str = "correlated", seed: int = 0) -> np.ndarray:
    """A Hessian [k, k] of a kind out of KINDS, or "identity"."""
    rng = np.random.default_rng(seed)
    if kind == "identity":
        return np.eye(k)
    if kind == "correlated":
        distance = np.abs(np.subtract.outer(np.arange(k), np.arange(k)))
        return 0.9**distance
    basis = rng.standard_normal((k, 8 if kind == "few tokens" else k // 2))
    h = basis @ basis.T + (0.2 * np.eye(k) if kind == "low rank" else 0)
    scale = rng.lognormal(0, 0.6, k)
    if kind == "dead inputs":
        scale[: k // 4] = 0
    return h * scale * scale[:, None]


def weights(n: int, k: int, seed: int = 0) -> np.ndarray:
    """Gaussian float32 [n, k]."""
    return (np.random.default_rng(seed).standard_normal((n, k)) * 0.02).astype(np.float32)


def odd_weights(n: int, k: int, seed: int) -> np.ndarray:
    """Zero, constant, tiny, huge, half empty, with outliers and in steps; the rest Gaussian.

    With fewer than eight rows, all of them are Gaussian.
    """
    w = weights(n, k, seed)
    if n < 8:
        return w
    w[0] = 0
    w[1] = 0.5
    w[2] *= np.float32(1e-36)
    w[3] *= np.float32(1e37)
    w[4, k // 2 :] = 0
    w[5, ::7] *= 80
    w[6] = np.round(w[6] * 100) / 64
    return w


def arguments(w: np.ndarray, h: np.ndarray, recipe: ldlq.LdlqRecipe) -> list:
    """What the core and the GPU library take, but for threads and instruction set."""
    prepared = ldlq.prepare(w, recipe)
    metric = make_metric(h, recipe.damping).as_dict()
    books = ldlq.books(recipe.code_pairs)
    return [prepared.weight, metric, books, prepared.supers, recipe.as_dict()]
