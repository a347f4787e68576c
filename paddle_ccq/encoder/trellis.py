# SPDX-License-Identifier: Apache-2.0
"""The data-free encoder of ccq-2t: bytes by the Viterbi algorithm, scales along with them.

trellis_reference.py says in NumPy what is searched; the compiled core (custom_ops/cpu/trellis.cpp)
does it, with the same bytes on any instruction set and thread count.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ..codec import formats, trellis
from ..codec.formats import Tensors
from ..codec.wint2 import pack_scales
from .base import Encoded, ErrorStats
from .recipes import TRELLIS_RECIPES, TrellisRecipe


def pack(found: dict[str, np.ndarray]) -> Tensors:
    """What a search found (trellis_reference.encode) -> the stored tensors."""
    n = len(found["supers"])
    return {
        "quant_weight": np.ascontiguousarray(found["words"].reshape(n, -1).T),
        "weight_scale": np.ascontiguousarray(pack_scales(found["scales"].T)),
        "super_scales": found["supers"].astype(ml_dtypes.bfloat16),
    }


class TrellisEncoder:
    """The search at one preset (see MatrixEncoder); `isa` pins an instruction set for tests."""

    format = trellis.NAME

    def __init__(
        self,
        preset: str,
        threads: int,
        isa: str = "auto",
        recipe: TrellisRecipe | None = None,
    ) -> None:
        self._threads = threads
        self._isa = isa
        self._recipe = recipe or TRELLIS_RECIPES[preset]

    def encode(self, weight: np.ndarray, name: str = "", rows: np.ndarray | None = None) -> Encoded:
        """See MatrixEncoder.encode."""
        n, k = weight.shape
        problem = formats.shape_problem(self.format, k, n)
        if problem:
            raise ValueError(problem)
        found = self._search(np.ascontiguousarray(weight, dtype=np.float32))
        # Channels are summed in order, so that the statistics, too, are reproducible.
        stats = ErrorStats(*(float(total) for total in found["sums"].sum(axis=0)))
        return Encoded(pack(found), stats)

    def _search(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        from ..compiled import core as _core

        return _core.trellis(weight, self._recipe.as_dict(), self._threads, self._isa)
