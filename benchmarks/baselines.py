# SPDX-License-Identifier: Apache-2.0
"""Plain 2-bit integer quantizers to compare with; they are not part of the product.

All take float32 [N, K] and return the weights that a decoder would see, groups of 64 along K.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

GROUP = 64
# Bits per weight: two bits, and a 16-bit scale with a 2-bit zero per group.
RTN_BITS = 2 + (16 + 2) / GROUP
# Two bits and a 4-bit scale per group, as WINT2; the super scale is not counted.
SYMMETRIC_BITS = 2 + 4 / GROUP

# Step of the best symmetric 4-level uniform quantizer of a unit Gaussian (Max 1960, table II).
GAUSSIAN_STEP = 0.9957


def rtn_int2(weight: np.ndarray) -> np.ndarray:
    """Round to nearest on each group's min..max range, with an integer zero."""
    w = weight.reshape(weight.shape[0], -1, GROUP)
    low, high = np.minimum(w.min(-1, keepdims=True), 0), np.maximum(w.max(-1, keepdims=True), 0)
    scale = np.maximum(high - low, np.float32(1e-30)) / 3
    zero = np.rint(-low / scale)
    q = np.clip(np.rint(w / scale) + zero, 0, 3)
    return ((q - zero) * scale).reshape(weight.shape).astype(np.float32)


def symmetric_int2(weight: np.ndarray) -> np.ndarray:
    """Levels -3/2, -1/2, 1/2, 3/2 times a 4-bit scale times a channel's bfloat16 super scale.

    Scales are searched as the CCQ encoder does: three super scales a channel, and for each the
    local scales around every group's nominal one, by squared error.
    """
    n = weight.shape[0]
    w = weight.reshape(n, -1, GROUP).astype(np.float32)
    rms = np.sqrt((w.astype(np.float64) ** 2).mean(-1))
    channel = np.sqrt((rms**2).mean(-1))
    best_error = np.full(n, np.inf)
    best = np.zeros_like(w)
    for kappa in (9, 11, 7):
        supers = (GAUSSIAN_STEP * channel / kappa).astype(ml_dtypes.bfloat16).astype(np.float32)
        safe = np.maximum(supers, np.float32(1e-30))[:, None]
        nominal = np.clip(np.rint(GAUSSIAN_STEP * rms / safe), 1, 15)
        group_error = np.full(rms.shape, np.inf)
        found = np.zeros_like(w)
        for offset in range(-3, 5):
            step = (np.clip(nominal + offset, 1, 15) * safe)[..., None].astype(np.float32)
            value = (np.clip(np.floor(w / step), -2, 1) + np.float32(0.5)) * step
            error = ((w - value) ** 2).sum(-1)
            better = error < group_error
            group_error[better] = error[better]
            found[better] = value[better]
        better = group_error.sum(-1) < best_error
        best_error[better] = group_error.sum(-1)[better]
        best[better] = found[better]
    return best.reshape(weight.shape)
