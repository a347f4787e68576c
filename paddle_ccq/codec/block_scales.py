# SPDX-License-Identifier: Apache-2.0
"""Matrices whose blocks share a scale: multiplying by the scales, and finding those that are wrong.

A block is (rows, columns) of a matrix [out, in]. A scale per row is a block (1, in), a scale for
the whole matrix a block (out, in), a group along the inputs a block (1, group). Blocks at the
lower and right edge may be partial.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

Block = tuple[int, int]

# Rows that are multiplied at a time: bounds the memory of the expanded scales.
_ROWS = 64
# UE8M0: a byte e stands for 2^(e - 127), and 255 for NaN.
_E8M0 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)


def grid(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    """How many blocks a matrix has along each axis."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def scale_values(stored: np.ndarray) -> np.ndarray:
    """Scales as float32: of any float type, or of bytes in UE8M0."""
    if stored.dtype in (np.uint8, ml_dtypes.float8_e8m0fnu):
        return _E8M0[stored.view(np.uint8)]
    return stored.astype(np.float32)


def multiply(values: np.ndarray, scales: np.ndarray, block: Block, first_row: int = 0) -> None:
    """Multiply a matrix in place, every block by its scale; one rounding in float32 a value.

    Args:
        values: float32 [rows, in].
        scales: float32 [row blocks, column blocks].
        first_row: the place of values[0] in its block.
    """
    count = values.shape[1] // block[1]
    whole = count * block[1]
    for begin in range(0, len(values), _ROWS):
        part = values[begin : begin + _ROWS]
        mine = scales[(first_row + begin + np.arange(len(part))) // block[0]]
        # Splitting the last axis gives a view, so this multiplies `values`.
        full = part[:, :whole].reshape(len(part), count, block[1])
        full *= mine[:, :count, None]
        part[:, whole:] *= mine[:, count:]


def wrong_scale(
    values: np.ndarray, scales: np.ndarray, block: Block, first_row: int = 0
) -> tuple[int, int] | None:
    """The first block whose scale is NaN, infinite, negative, or zero though its values are not.

    `values` are those before the multiplication. A block of zeros may have the scale zero.
    """
    for i, j in np.argwhere(~(np.isfinite(scales) & (scales > 0))).tolist():
        rows, columns = block_slices((i, j), block, values.shape, first_row)
        if scales[i, j] != 0 or np.any(values[rows, columns]):
            return i, j
    return None


def block_slices(
    place: tuple[int, int], block: Block, shape: tuple[int, ...], first_row: int = 0
) -> tuple[slice, slice]:
    """Rows and columns of a matrix that a block covers."""
    top, left = place[0] * block[0] - first_row, place[1] * block[1]
    return (
        slice(max(top, 0), min(top + block[0], shape[0])),
        slice(left, min(left + block[1], shape[1])),
    )


def first_nonfinite_block(
    values: np.ndarray, block: Block, first_row: int = 0
) -> tuple[int, int] | None:
    """The first block, by its first such row, that holds a NaN or an infinity."""
    rows = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if not rows.size:
        return None
    column = int(np.argmin(np.isfinite(values[rows[0]])))
    return (first_row + int(rows[0])) // block[0], column // block[1]
