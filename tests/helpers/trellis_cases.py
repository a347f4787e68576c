# SPDX-License-Identifier: Apache-2.0
"""Weights and recipes on which encoders of ccq-2t could differ from each other."""

from __future__ import annotations

import numpy as np

from paddle_ccq.encoder.recipes import TrellisRecipe

# All states live at most positions; hardly any do.
WIDE = TrellisRecipe(1 / 104.5, (9.5, 5.0), (-1, 1), beam=65534)
NARROW = TrellisRecipe(1 / 104.5, (9.5,), (0, 0), beam=2000)
KINDS = ("gaussian", "awkward", "steps", "far apart")


def weights(kind: str, n: int, k: int, seed: int = 0) -> np.ndarray:
    """float32 [n, k].

    awkward: channels in turn with zero groups, tiny groups, outliers, tiny and huge scales, and
    only zeros; steps: few values, so that many costs are equal; far apart: neighbouring groups
    whose rms differs by up to a thousand times.
    """
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, k)).astype(np.float32)
    if kind == "awkward":
        w[0::8, 64:128] = 0
        w[1::8, :64] *= 1e-3
        w[1::8, -64:] *= 0.03
        w[2::8, 20::97] = 60
        w[3::8] *= 1e-29
        w[4::8] *= 1e-36
        w[5::8] *= 1e30
        w[6::8] = 0
        w[7::8] = np.sign(w[7::8]) * np.abs(w[7::8]) ** 4
    elif kind == "steps":
        w = np.round(w).astype(np.float32) / np.float32(8)
    elif kind == "far apart":
        w *= np.repeat(rng.choice([0.01, 0.1, 1, 10], (n, k // 64)), 64, axis=1).astype(np.float32)
    return w


def hessian(k: int, kind: str = "autoregressive") -> np.ndarray:
    """[k, k]: of neighbours that go together, or of few directions and inputs of all sizes."""
    if kind == "autoregressive":
        return 0.9 ** np.abs(np.subtract.outer(np.arange(k), np.arange(k)))
    rng = np.random.default_rng(k)
    x = rng.standard_normal((k // 4, k)) * rng.lognormal(0, 1, k)
    return x.T @ x / len(x)
