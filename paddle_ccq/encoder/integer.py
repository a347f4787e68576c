# SPDX-License-Identifier: Apache-2.0
"""wint8 and wint4 per channel behind the encoder interface; there is nothing to search."""

from __future__ import annotations

import numpy as np

from ..codec.weight_only import (
    dequantize_wint4,
    dequantize_wint8,
    quantize_wint4,
    quantize_wint8,
)
from .base import Encoded, ErrorStats


class IntegerEncoder:
    """Rounds to the per-channel grid of the largest magnitude, byte for byte as Paddle does."""

    def __init__(self, format: str) -> None:
        self.format = format
        self._functions = {
            "wint8": (quantize_wint8, dequantize_wint8),
            "wint4": (quantize_wint4, dequantize_wint4),
        }[format]

    def encode(self, weight: np.ndarray, name: str = "", rows: np.ndarray | None = None) -> Encoded:
        """See MatrixEncoder.encode; weights are rounded to bfloat16 first, as Paddle needs them."""
        quantize, dequantize = self._functions
        q, scale = quantize(weight.T)
        stats = ErrorStats.between(weight, dequantize(q, scale).T)
        return Encoded({"quant_weight": q, "weight_scale": scale}, stats)
