# SPDX-License-Identifier: Apache-2.0
"""wint8 and wint4 per channel, byte-identical to Paddle's weight_quantize(..., arch=80).

FastDeploy loads these tensors as they are: already scaled, made unsigned, permuted and interleaved
for the tensor cores of SM80 and newer. With w [K, N] in bfloat16:

    scale[n] = bfloat16(max_k |w| / M)              M = 127 (wint8) or 7 (wint4)
    q[k, n]  = round_half_away(w / scale[n])        a column of zeros gets scale 0

Storage order, for one tile of 64 rows by C columns (C = 2 for wint8, 4 for wint4): all 64 rows of
the first column, then of the next; tiles follow along K first, then along N. Inside a column the
rows of every block of 8 * C are transposed from [C, 8] to [8, C]. Values are stored plus 128 or
plus 8; two wint4 values share a byte, the first in the low nibble.
"""

from __future__ import annotations

import numpy as np

from .floats import BFLOAT16

TILE_ROWS = 64
COLUMN_MULTIPLE = 16
# Largest magnitude and columns per interleaved tile, by bits.
_MAX = {8: 127, 4: 7}
_COLUMNS = {8: 2, 4: 4}
# What 0 / 0 in a column of zeros becomes: Paddle clamps the NaN, in a different order for each.
_ZERO_COLUMN = {8: 127, 4: -7}


def _check_shape(k: int, n: int, bits: int) -> None:
    if k % TILE_ROWS or n % COLUMN_MULTIPLE:
        raise ValueError(
            f"wint{bits} needs K a multiple of {TILE_ROWS} and N of {COLUMN_MULTIPLE}, "
            f"got K={k}, N={n}"
        )


def _quantize(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 [K, N] states and bfloat16 [N] scales."""
    w = np.asarray(weight).astype(BFLOAT16).astype(np.float32)
    top = np.float32(_MAX[bits])
    scale = (np.abs(w).max(axis=0) / top).astype(BFLOAT16)
    with np.errstate(divide="ignore", invalid="ignore"):
        x = w / scale.astype(np.float32)
    x = np.trunc(x + np.copysign(np.float32(0.5), x))
    x = np.nan_to_num(x, nan=_ZERO_COLUMN[bits])
    return np.clip(x, -top, top).astype(np.int8), scale


def round_wint8(weight: np.ndarray) -> np.ndarray:
    """What wint8 makes of a weight [K, N], as float32, without storing it on the way."""
    states, scale = _quantize(weight, 8)
    return states * scale.astype(np.float32)


def interleave(states: np.ndarray, bits: int) -> np.ndarray:
    """Signed states [K, N] -> the stored int8 tensor: [N, K] for wint8, [N/2, K] for wint4.

    Raises:
        ValueError: if 64 does not divide K or 16 does not divide N.
    """
    k, n = states.shape
    _check_shape(k, n, bits)
    c = _COLUMNS[bits]
    x = states.T.reshape(n, k // (8 * c), c, 8).swapaxes(2, 3)
    x = x.reshape(n // c, c, k // TILE_ROWS, TILE_ROWS).swapaxes(1, 2)
    unsigned = (x.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    if bits == 8:
        return unsigned.reshape(n, k).view(np.int8)
    pairs = unsigned.reshape(-1, 2)
    return (pairs[:, 0] | (pairs[:, 1] << 4)).reshape(n // 2, k).view(np.int8)


def deinterleave(stored: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of interleave: stored int8 tensor -> signed int8 states [K, N]."""
    k, n = stored.shape[1], stored.shape[0] * (8 // bits)
    _check_shape(k, n, bits)
    raw = np.ascontiguousarray(stored).view(np.uint8)
    if bits == 4:
        raw = np.stack([raw & 15, raw >> 4], axis=-1)
    c = _COLUMNS[bits]
    x = raw.reshape(n // c, k // TILE_ROWS, c, TILE_ROWS).swapaxes(1, 2)
    x = x.reshape(n, k // (8 * c), 8, c).swapaxes(2, 3).reshape(n, k)
    return (x.astype(np.int16) - (1 << (bits - 1))).astype(np.int8).T


def quantize_wint8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float [K, N] -> (quant_weight int8 [N, K], weight_scale bfloat16 [N])."""
    states, scale = _quantize(weight, 8)
    return interleave(states, 8), scale


def quantize_wint4(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float [K, N] -> (quant_weight int8 [N/2, K], weight_scale bfloat16 [N])."""
    states, scale = _quantize(weight, 4)
    return interleave(states, 4), scale


def dequantize_wint8(quant_weight: np.ndarray, weight_scale: np.ndarray) -> np.ndarray:
    """(int8 [N, K], scale [N]) -> float32 [K, N], exact products."""
    return deinterleave(quant_weight, 8).astype(np.float32) * weight_scale.astype(np.float32)


def dequantize_wint4(quant_weight: np.ndarray, weight_scale: np.ndarray) -> np.ndarray:
    """(int8 [N/2, K], scale [N]) -> float32 [K, N], exact products."""
    return deinterleave(quant_weight, 4).astype(np.float32) * weight_scale.astype(np.float32)
