# SPDX-License-Identifier: Apache-2.0
"""FP8 E4M3 as it is stored: one byte a value, without infinities, 0x7F and 0xFF being NaN."""

from __future__ import annotations

import ml_dtypes
import numpy as np

_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def decode_e4m3(codes: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The values of E4M3 codes in float32, exactly; into `out` where it is given.

    Args:
        codes: uint8 or float8_e4m3fn of any shape.
        out: float32 of the same shape.
    """
    # Every byte is a valid index; "clip" lets NumPy write into `out` without a copy.
    return np.take(_E4M3, codes.view(np.uint8), out=out, mode="clip")
