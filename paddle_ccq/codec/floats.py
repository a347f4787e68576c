# SPDX-License-Identifier: Apache-2.0
"""Rounding to the 16-bit float types that weights and scales are stored in."""

from __future__ import annotations

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# The types an engine may compute in; a WINT2 kernel rounds scale and product to it.
RUNTIME_DTYPES: dict[str, np.dtype] = {
    "bfloat16": BFLOAT16,
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


def round_to(values: np.ndarray, runtime: str) -> np.ndarray:
    """float32 values rounded (to nearest even) to what `runtime` can hold, still as float32.

    Raises:
        ValueError: for a runtime that is not bfloat16, float16 or float32.
    """
    if runtime not in RUNTIME_DTYPES:
        raise ValueError(f"runtime {runtime!r} is not one of {', '.join(RUNTIME_DTYPES)}")
    values = np.asarray(values, dtype=np.float32)
    if runtime == "float32":
        return values
    return values.astype(RUNTIME_DTYPES[runtime]).astype(np.float32)
