# SPDX-License-Identifier: Apache-2.0
"""Values of tensors: which of them cannot be stored, and sums over them."""

from __future__ import annotations

import numpy as np

from ..host import on_stripes
from .safetensors_format import DTYPES

# Values looked at in one go when searching for NaN and infinity: they and the mask stay in a cache.
_CHUNK = 1 << 18
_BF16_EXPONENT = np.uint16(0x7F80)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_F32_INFINITY = np.uint32(0x7F800000)
# Half way from bfloat16's largest value to the next power of two: rounds to even, to infinity.
_F32_BEYOND_BF16 = np.uint32(0x7F7F8000)

# Matrices without a larger value add nothing that a norm's epsilon would not hide, and encoders
# may store them as zeros: squares of such values are none in float32.
_VANISHING = 1e-24
# rel-MSE up to which what is stored for one of these is as small; 1 is that of zeros.
_VANISHING_ERROR = 4.0


def finite(values: np.ndarray, stored_as: str) -> tuple[np.ndarray, int]:
    """The values with 0 for those that `stored_as` ("BF16", "F32") cannot hold, and their count.

    These are NaN, infinity, and what would be rounded to infinity.
    """
    bad = count_nonfinite(values, stored_as)
    if not bad:
        return values, 0
    clean = values.copy()
    flat = clean.reshape(-1)
    for begin in range(0, flat.size, _CHUNK):
        chunk = flat[begin : begin + _CHUNK]
        chunk[_nonfinite(chunk, stored_as)] = 0
    return clean, bad


def count_nonfinite(values: np.ndarray, stored_as: str = "F32") -> int:
    """How many values are NaN or infinite, or would be when stored as "BF16"."""
    flat = values.reshape(-1)

    def count(stripe: slice) -> int:
        return sum(
            int(
                np.count_nonzero(
                    _nonfinite(flat[begin : min(begin + _CHUNK, stripe.stop)], stored_as)
                )
            )
            for begin in range(stripe.start, stripe.stop, _CHUNK)
        )

    return sum(on_stripes(count, flat.size, _CHUNK))


def _nonfinite(chunk: np.ndarray, stored_as: str) -> np.ndarray:
    """Which values of a contiguous row are NaN or infinite once stored, as a mask."""
    if chunk.dtype == DTYPES["BF16"]:
        return (chunk.view(np.uint16) & _BF16_EXPONENT) == _BF16_EXPONENT
    if chunk.dtype == np.float32:
        limit = _F32_BEYOND_BF16 if stored_as == "BF16" else _F32_INFINITY
        return (chunk.view(np.uint32) & _MAGNITUDE) >= limit
    return ~np.isfinite(chunk)  # half precision, whose range is within bfloat16's


def is_approximation(rel_mse: float, weight: np.ndarray, limit: float) -> bool:
    """Whether what is stored for a matrix can stand for it, by its rel-MSE and its format's limit.

    What `quantize` writes and what `verify` accepts are decided here alike.
    """
    if rel_mse <= limit:
        return True
    return rel_mse <= _VANISHING_ERROR and float(np.abs(weight).max()) <= _VANISHING


def energy(values: np.ndarray) -> float:
    """Sum of squares, in float64: squares of large float32 values are beyond float32's range."""
    return float(sum(np.dot(row, row) for row in map(_as_float64, values)))


def difference_energy(a: np.ndarray, b: np.ndarray) -> float:
    """energy(a - b), in float64, a row at a time."""
    rows = (_as_float64(x) - _as_float64(y) for x, y in zip(a, b, strict=True))
    return float(sum(np.dot(row, row) for row in rows))


def product(a: np.ndarray, b: np.ndarray) -> float:
    """Sum of the products of two arrays' values, in float64, a row at a time."""
    return float(sum(np.dot(_as_float64(x), _as_float64(y)) for x, y in zip(a, b, strict=True)))


def _as_float64(row: np.ndarray) -> np.ndarray:
    return np.asarray(row, np.float64).ravel()
