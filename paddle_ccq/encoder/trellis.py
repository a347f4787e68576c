# SPDX-License-Identifier: Apache-2.0
"""The data-free encoder of ccq-2t: bytes by the Viterbi algorithm, scales along with them.

trellis_reference.py says in NumPy what is searched; the compiled core (custom_ops/cpu/trellis.cpp)
does it, with the same bytes on any instruction set and thread count.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ..codec import trellis
from ..codec.formats import Tensors
from ..codec.wint2 import pack_scales
from .base import ChannelEncoder
from .recipes import TRELLIS_RECIPES, TrellisRecipe


def pack(found: dict[str, np.ndarray]) -> Tensors:
    """What a search found (trellis_reference.encode) -> the stored tensors."""
    n = len(found["supers"])
    return {
        "quant_weight": np.ascontiguousarray(found["words"].reshape(n, -1).T),
        "weight_scale": np.ascontiguousarray(pack_scales(found["scales"].T)),
        "super_scales": found["supers"].astype(ml_dtypes.bfloat16),
    }


class TrellisEncoder(ChannelEncoder):
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

    def _pack(self, found: dict[str, np.ndarray]) -> Tensors:
        return pack(found)

    def _search(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        from ..compiled import core as _core

        return _core.trellis(weight, self._recipe.as_dict(), self._threads, self._isa)
