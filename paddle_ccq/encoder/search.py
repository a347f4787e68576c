# SPDX-License-Identifier: Apache-2.0
"""The data-free encoder: words, local scales, super scale and code pair chosen together.

Every word is picked among the vectors that its format can decode (256 for WINT2), by the exact
squared distance, for every local scale near the group's nominal one, for several super scales and,
in WINT2, for the channel's best code zero-points. reference.py says the same in NumPy; the compiled
core (custom_ops/cpu) does it, with the same bytes on any instruction set and thread count.
"""

from __future__ import annotations

import numpy as np

from ..codec import formats
from . import layouts
from .base import ChannelEncoder
from .recipes import RECIPES, Recipe


def pair_books(format: str, recipe: Recipe) -> layouts.PairBooks:
    """The code books that a recipe chooses among, one list for each code pair."""
    return layouts.LAYOUTS[format].books(recipe.code_pairs)


class SearchEncoder(ChannelEncoder):
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

    def _pack(self, found: dict[str, np.ndarray]) -> formats.Tensors:
        return self._layout.pack(found)

    def _search(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        from ..compiled import core as _core

        return _core.encode(
            weight,
            self._books,
            list(self._layout.index_bits),
            self._layout.as_dict(),
            self._recipe.as_dict(),
            self._threads,
            self._isa,
        )
