# SPDX-License-Identifier: Apache-2.0
"""The data-free encoder: words, local scales, super scale and code pair chosen together.

Every word is picked among the vectors that its format can decode (256 for WINT2), by the exact
squared distance, for every local scale near the group's nominal one, for several super scales and,
in WINT2, for the channel's best code zero-points. reference.py says the same in NumPy; the compiled
core (custom_ops/cpu) does it, with the same bytes on any instruction set and thread count.
"""

from __future__ import annotations

import numpy as np

from ..codec import formats, wint2
from ..codec.spare_scale import CCQ_2_5, CCQ_2_75
from . import layouts
from .base import Encoded, ErrorStats
from .recipes import CODE_SCALE, CODE_ZERO_POINTS, RECIPES, Recipe

_SPARE_SCALE = {f.name: f for f in (CCQ_2_5, CCQ_2_75)}

# books[pair][book]: signed states of every entry.
PairBooks = list[list[np.ndarray]]


def pair_books(format: str, recipe: Recipe) -> PairBooks:
    """The code books that a recipe chooses among, one list for each code pair."""
    if format == "wint2":
        zero_points = CODE_ZERO_POINTS[: recipe.code_pairs]
        return [[wint2.codebook(CODE_SCALE, zp)] for zp in zero_points]
    return [layouts.spare_scale_books(_SPARE_SCALE[format])]


def pack(format: str, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the core (or reference.py) found -> the format's stored tensors."""
    words, scales, supers = found["words"], found["scales"], found["supers"]
    if format == "wint2":
        zero_points = np.array(CODE_ZERO_POINTS)[found["pairs"]]
        return layouts.pack_wint2(words, scales, supers, CODE_SCALE, zero_points)
    return layouts.pack_spare_scale(_SPARE_SCALE[format], words, scales, supers)


class SearchEncoder:
    """The search at one preset (see MatrixEncoder); `isa` pins an instruction set for tests."""

    def __init__(
        self,
        format: str,
        preset: str,
        threads: int,
        isa: str = "auto",
        recipe: Recipe | None = None,
    ) -> None:
        self.format = format
        self._threads = threads
        self._isa = isa
        self._layout = layouts.LAYOUTS[format]
        self._recipe = recipe or RECIPES[format][preset]
        self._books = pair_books(format, self._recipe)

    def encode(self, weight: np.ndarray, name: str = "", rows: np.ndarray | None = None) -> Encoded:
        """See MatrixEncoder.encode."""
        n, k = weight.shape
        problem = formats.shape_problem(self.format, k, n)
        if problem:
            raise ValueError(problem)
        found = self._search(np.ascontiguousarray(weight, dtype=np.float32))
        # Channels are summed in order, so that the statistics, too, are reproducible.
        stats = ErrorStats(*(float(total) for total in found["sums"].sum(axis=0)))
        return Encoded(pack(self.format, found), stats)

    def _search(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        from .. import _core

        return _core.encode(
            weight,
            self._books,
            list(self._layout.index_bits),
            self._layout.as_dict(),
            self._recipe.as_dict(),
            self._threads,
            self._isa,
        )
