# SPDX-License-Identifier: Apache-2.0
"""How the search sees each format: vectors, code books, and the words they are put into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import ml_dtypes
import numpy as np

from ..codec import wint2
from ..codec.formats import Tensors
from ..codec.spare_scale import CCQ_2_5, CCQ_2_75, SpareScaleFormat
from .recipes import CODE_SCALE, CODE_ZERO_POINTS

LANES = 16

# books[pair][book]: signed states of every entry.
PairBooks = list[list[np.ndarray]]


@dataclass(frozen=True)
class LaneSet:
    """Up to 16 vectors of a group that share a code book (custom_ops/cpu/encode.h)."""

    book: int
    lanes: int
    first: int
    stride: int
    dims: int
    word: int
    shift: int


@dataclass(frozen=True)
class SearchLayout:
    """One format for the search.

    books: how many code pairs to choose among -> their code books.
    pack: what the core or reference.py found ("words", "scales", "supers", "pairs") -> the
    format's stored tensors.
    fraction bits are chosen so that four times the state range fits 16 bits: a weight beyond that
    is an outlier whose nearest vector no longer depends on how far out it is.
    """

    sets: tuple[LaneSet, ...]
    words: int
    fraction: int
    index_bits: tuple[int, ...]
    state_min: int
    state_max: int
    remainder_shift: int
    scale_max: int
    books: Callable[[int], PairBooks]
    pack: Callable[[Mapping[str, np.ndarray]], Tensors]

    def as_dict(self) -> dict[str, object]:
        """For the compiled core."""
        values = asdict(self)
        for only_here in ("index_bits", "books", "pack"):
            values.pop(only_here)
        values["sets"] = [asdict(s) for s in self.sets]
        return values


def _spare_scale_layout(f: SpareScaleFormat, fraction: int) -> SearchLayout:
    """Full words in sets of 16 vectors a code; the 64th row is the remainder."""
    full_words = f.words_per_group - 1
    sets, row, below = [], 0, f.word_bits
    for book, code in enumerate(f.codes):
        below -= code.T
        for word in range(0, full_words, LANES):
            lanes = min(LANES, full_words - word)
            first = row + word * f.rows_per_word
            sets.append(LaneSet(book, lanes, first, f.rows_per_word, code.N, word, below))
        row += code.N
    return SearchLayout(
        sets=tuple(sets),
        words=f.words_per_group,
        fraction=fraction,
        index_bits=tuple(max(code.T, 8) for code in f.codes),
        state_min=-f.zero_point,
        state_max=f.mask - f.zero_point,
        remainder_shift=f.scale_bits,
        scale_max=f.scale_max,
        books=lambda _: [spare_scale_books(f)],
        pack=lambda found: pack_spare_scale(f, found["words"], found["scales"], found["supers"]),
    )


LAYOUTS: dict[str, SearchLayout] = {
    "wint2": SearchLayout(
        sets=(LaneSet(0, 16, 0, wint2.ROWS_PER_BYTE, wint2.ROWS_PER_BYTE, 0, 0),),
        words=wint2.GROUP // wint2.ROWS_PER_BYTE,
        fraction=8,
        index_bits=(8,),
        state_min=-wint2.CODE.zero_point,
        state_max=wint2.CODE.mask - wint2.CODE.zero_point,
        remainder_shift=0,
        scale_max=wint2.SCALE_MAX,
        books=lambda pairs: [
            [wint2.codebook(CODE_SCALE, zero_point)] for zero_point in CODE_ZERO_POINTS[:pairs]
        ],
        pack=lambda found: pack_wint2(
            found["words"], found["scales"], found["supers"], found["pairs"]
        ),
    ),
    CCQ_2_75.name: _spare_scale_layout(CCQ_2_75, fraction=10),
    CCQ_2_5.name: _spare_scale_layout(CCQ_2_5, fraction=11),
}


def spare_scale_books(f: SpareScaleFormat) -> list[np.ndarray]:
    """Signed states of every word of each code."""
    return [(code.codebook() - f.zero_point).astype(np.int32) for code in f.codes]


def pack_wint2(
    words: np.ndarray, scales: np.ndarray, supers: np.ndarray, pairs: np.ndarray
) -> Tensors:
    """Search output ([N, K/64, 16], [N, K/64], [N], index of its code pair [N]) -> tensors."""
    n = words.shape[0]
    return {
        "quant_weight": np.ascontiguousarray(words.reshape(n, -1).astype(np.uint8).T),
        "weight_scale": np.ascontiguousarray(wint2.pack_scales(scales.T)),
        "super_scales": supers.astype(ml_dtypes.bfloat16),
        "code_scale": np.full(n, CODE_SCALE, np.float32),
        "code_zp": np.array(CODE_ZERO_POINTS, np.float32)[pairs],
    }


def pack_spare_scale(
    f: SpareScaleFormat, words: np.ndarray, scales: np.ndarray, supers: np.ndarray
) -> Tensors:
    """Search output -> stored tensors, local scales put into the last words."""
    words = words.copy()
    words[:, :, -1] |= scales
    stored = words.reshape(words.shape[0], -1).astype(f"uint{f.storage.itemsize * 8}").T
    return {
        "quant_weight": np.ascontiguousarray(stored).view(f.storage),
        "super_scales": supers.astype(ml_dtypes.bfloat16),
    }
