# SPDX-License-Identifier: Apache-2.0
"""Cutting float matrices for tensor parallelism, the way FastDeploy cuts them.

FastDeploy cannot cut packed WINT2 scales, nor interleaved wint8 and wint4 weights, so every rank
gets its own part of the float matrix, quantized on its own. Where a tensor is cut, its family says
(families/); what has no cut is the same on every rank.
"""

from __future__ import annotations

import numpy as np

from ..families.tensor import Cut


def take(
    array: np.ndarray, cut: Cut | None, rank: int, size: int, transposed: bool = False
) -> np.ndarray:
    """One rank's part of an array [in, out], or [out, in] if `transposed`; C-contiguous.

    The array itself is returned where nothing is cut.
    """
    if cut is None or size == 1:
        return np.ascontiguousarray(array)
    axis = 1 - cut.axis if transposed else cut.axis
    pieces = [
        array[begin:end] if axis == 0 else array[:, begin:end]
        for begin, end in cut.blocks(rank, size)
    ]
    if len(pieces) == 1:
        return np.ascontiguousarray(pieces[0])
    return np.concatenate(pieces, axis=axis)


def join(parts: list[np.ndarray], cut: Cut | None) -> np.ndarray:
    """The whole matrix [in, out] from the parts of all ranks: the inverse of `take`."""
    if cut is None or len(parts) == 1:
        return parts[0]
    length = sum(cut.parts)
    shape = tuple(length if axis == cut.axis else n for axis, n in enumerate(parts[0].shape))
    whole = np.empty(shape, parts[0].dtype)
    for rank, part in enumerate(parts):
        start = 0
        for begin, end in cut.blocks(rank, len(parts)):
            source = slice(start, start + end - begin)
            start += end - begin
            if cut.axis == 0:
                whole[begin:end] = part[source]
            else:
                whole[:, begin:end] = part[:, source]
    return whole
