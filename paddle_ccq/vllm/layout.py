# SPDX-License-Identifier: Apache-2.0
"""Stored tensors cut for one rank, and integer weights put into the order that products read.

Everything here works on NumPy arrays and on torch tensors alike, on whatever device they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..codec import formats
from ..codec.weight_only import TILE_ROWS

# Columns of an interleaved tile, by bits (codec/weight_only.py).
_TILE_COLUMNS = {8: 2, 4: 4}
UNIT_COLUMNS, UNIT_BYTES = 16, 1024  # custom_ops/gpu/moe/linear_w8.h


@dataclass(frozen=True)
class Piece:
    """Columns or rows `source`..`source + size` of the whole, at `target` of a rank's part."""

    target: int
    source: int
    size: int


def pieces(parts: Sequence[int], rank: int, size: int, copies: Sequence[int] = ()) -> list[Piece]:
    """A rank's share of fused parts, each cut in `size`, one behind the other.

    Args:
        parts: whole widths, such as [gate, up] or [q, k, v].
        copies: for each part, how many neighbouring ranks hold the same piece (key heads where
            there are fewer than ranks); 1 where left out.

    Raises:
        ValueError: if a part can't be cut evenly.
    """
    found, source, target = [], 0, 0
    for i, part in enumerate(parts):
        repeat = copies[i] if copies else 1
        if size % repeat or part % (size // repeat):
            raise ValueError(f"{part} can't be cut into {size // repeat} equal parts")
        width = part // (size // repeat)
        found.append(Piece(target, source + rank // repeat * width, width))
        source += part
        target += width
    return found


def whole(parts: Sequence[int]) -> list[Piece]:
    """Everything, as one piece: for a checkpoint that is already cut."""
    return [Piece(0, 0, sum(parts))]


# Rows of the matrix in one row of a stored tensor, by format and suffix; 0: it has no rows.
def rows_per_stored(format: str, suffix: str, k: int) -> tuple[int, int]:
    """(rows of the matrix, rows of the tensor) that belong together; (0, 0) for a column tensor.

    Raises:
        KeyError: if the format has no such tensor.
    """
    shape, _ = formats.tensor_specs(format, k, 128)[suffix]
    if len(shape) == 1:
        return 0, 0
    step = formats.get(format).row_multiple
    return step, shape[0] * step // k


def ccq_slices(
    format: str, suffix: str, k: int, columns: Sequence[Piece], rows: Piece
) -> Iterator[tuple[Any, Any]]:
    """(index into a rank's tensor, index into the stored tensor) for one tensor of [k, n].

    Raises:
        ValueError: if rows are cut elsewhere than between the format's row steps.
    """
    step, stored = rows_per_stored(format, suffix, k)
    for piece in columns:
        target = slice(piece.target, piece.target + piece.size)
        source = slice(piece.source, piece.source + piece.size)
        if not step:
            yield target, source
            continue
        if rows.source % step or rows.size % step:
            raise ValueError(f"{format} is cut in steps of {step} rows, not at {rows.source}")
        first, count = rows.source // step * stored, rows.size // step * stored
        yield (slice(0, count), target), (slice(first, first + count), source)


def interleaved_tiles(stored: Any, bits: int) -> Any:
    """wint8 int8 [N, K] or wint4 int8 [N/2, K] as uint8 [N / columns, K / 64, bytes] of tiles."""
    columns = _TILE_COLUMNS[bits]
    k, n = stored.shape[1], stored.shape[0] * 8 // bits
    return stored.reshape(n // columns, k // TILE_ROWS, TILE_ROWS * columns * bits // 8)


def cut_interleaved(stored: Any, bits: int, columns: Sequence[Piece], rows: Piece) -> list[Any]:
    """The tiles of a rank's columns and rows, a part for each piece of columns.

    Raises:
        ValueError: if a tile would be torn apart.
    """
    tiles, width = interleaved_tiles(stored, bits), _TILE_COLUMNS[bits]
    for piece, step in (*((p, width) for p in columns), (rows, TILE_ROWS)):
        if piece.source % step or piece.size % step:
            raise ValueError(
                f"wint{bits} is cut in steps of {width} columns and {TILE_ROWS} rows, not at"
                f" {piece.source} + {piece.size}"
            )
    first, last = rows.source // TILE_ROWS, (rows.source + rows.size) // TILE_ROWS
    return [tiles[p.source // width : (p.source + p.size) // width, first:last] for p in columns]


def states(tiles: Any, bits: int) -> Any:
    """Tiles of a part -> states plus 128 (or 8) as uint8 [N, K], row-major, one a byte."""
    groups, blocks, size = tiles.shape
    columns = _TILE_COLUMNS[bits]
    n, k = groups * columns, blocks * TILE_ROWS
    if bits == 4:
        flat = tiles.reshape(groups, blocks, size, 1)
        made = type(tiles).__module__.split(".")[0]
        low, high = flat & 15, flat >> 4
        if made == "torch":
            import torch

            tiles = torch.cat([low, high], dim=3)
        else:
            import numpy as np

            tiles = np.concatenate([low, high], axis=3)
    tiles = tiles.reshape(groups, blocks, columns, TILE_ROWS).swapaxes(1, 2)
    tiles = tiles.reshape(n, k // (8 * columns), 8, columns).swapaxes(2, 3)
    return tiles.reshape(n, k)


def product_units(bytes_: Any) -> Any:
    """uint8 [N, K] of states plus 128 -> [N/16, K/64, 1024], the order of linear_w8.h."""
    n, k = bytes_.shape
    units = bytes_.reshape(n // UNIT_COLUMNS, 2, 8, k // TILE_ROWS, 4, 16)
    # (tile, h, g, step, t, i) -> (tile, step, h, g, t, i)
    units = units.swapaxes(1, 3).swapaxes(2, 3)
    return units.reshape(n // UNIT_COLUMNS, k // TILE_ROWS, UNIT_BYTES)


def nibble_pairs(bytes_: Any) -> Any:
    """uint8 [N, K] of states plus 8 -> [N, K/2], the earlier row in the low nibble (vLLM's)."""
    return bytes_[:, 0::2] | (bytes_[:, 1::2] << 4)
