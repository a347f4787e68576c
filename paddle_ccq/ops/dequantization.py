# SPDX-License-Identifier: Apache-2.0
"""ccq_dequant: stored tensors to a matrix of floats."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..codec.floats import RUNTIME_DTYPES
from ..compiled import core as _core
from . import checks
from .packed import core_arguments


def dequant(
    format: str,
    tensors: Mapping[str, np.ndarray],
    dtype: str = "bfloat16",
    threads: int | None = None,
) -> np.ndarray:
    """[K, N] of `dtype` (float32, bfloat16 or float16), rows in stored order.

    Bit for bit codec.formats.decode(format, tensors, dtype): what an engine computing in that
    type multiplies with.

    Raises:
        ValueError: naming the tensor or argument that does not fit.
    """
    if dtype not in RUNTIME_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(RUNTIME_DTYPES)}, got {dtype!r}")
    found, _, _ = checks.stored(format, tensors)
    out = _core.dequantize(*core_arguments(format, found), dtype, checks.threads(threads))
    return out.view(RUNTIME_DTYPES[dtype])
