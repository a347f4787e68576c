# SPDX-License-Identifier: Apache-2.0
"""Cutting float matrices for tensor parallelism, the way FastDeploy cuts them.

FastDeploy cannot cut packed WINT2 scales, nor interleaved wint8 and wint4 weights, so every rank
gets its own part of the float matrix, quantized on its own. The cuts are those of weight_infos in
FastDeploy's models/ernie4_5_moe.py with models/tp_utils.py: q, k and v by heads, gate and up each
by columns, o_proj and down_proj by rows, embed_tokens by vocabulary rows and lm_head by vocabulary
columns; everything else is the same on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Cut:
    """How a matrix [in, out] is cut: along `axis`, each of the fused `parts` in equal pieces.

    `unit` is what may not be torn apart: the head size for qkv, otherwise 1.
    """

    axis: int
    parts: tuple[int, ...]
    unit: int = 1

    def fits(self, size: int) -> bool:
        """Whether every part can be cut into `size` pieces."""
        return all(part % (size * self.unit) == 0 for part in self.parts)

    def blocks(self, rank: int, size: int) -> list[tuple[int, int]]:
        """(begin, end) along the axis of what belongs to a rank, in order."""
        result = []
        start = 0
        for part in self.parts:
            width = part // size
            result.append((start + rank * width, start + (rank + 1) * width))
            start += part
        return result

    def rank_shape(self, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
        """Shape of one rank's part of a matrix [in, out]."""
        return tuple(n // size if axis == self.axis else n for axis, n in enumerate(shape))


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
