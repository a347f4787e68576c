# SPDX-License-Identifier: Apache-2.0
"""The calibrated encoder of ccq-2t: the same tensors, chosen by the error of the outputs.

Viterbi over bytes as in the data-free search, but in the metric of each block (trellis_metric.py),
and every survivor feeds the errors of its own sequence back into the weights that follow. Sweeps
then search group after group anew, with all others fixed. trellis_ldlq_reference.py says the same
in NumPy; the compiled core (custom_ops/cpu/trellis_ldlq.cpp) does it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..codec import trellis
from . import trellis as data_free
from .base import MatrixEncoder
from .ldlq import Hessians, LdlqEncoder, Prepared, unscaled
from .recipes import CoreRecipe
from .trellis_metric import TrellisMetric, make_trellis_metric


@dataclass(frozen=True)
class TrellisLdlqRecipe(CoreRecipe):
    """What the calibrated search of ccq-2t tries; chosen on synthetic Hessians, not on a model.

    Attributes:
        nominal, kappas, window: as in recipes.TrellisRecipe.
        beam: sequences are dropped whose cost is this far above the cheapest one's, in quarters of
            squares of the code's values; an average position costs about 800.
        sweeps: rounds in which every group is searched anew.
        damping: share of the mean of H's diagonal that is added to it.
    """

    nominal: float = 1 / 104.5
    kappas: tuple[float, ...] = (11.0,)
    window: tuple[int, int] = (-1, 2)
    beam: int = 2250
    sweeps: int = 1
    damping: float = 0.01


TRELLIS_LDLQ_RECIPES: dict[str, TrellisLdlqRecipe] = {
    # The sweep is needed: an input of a hundred times the mean energy with a weight of four times
    # the rms is beyond the code's values at the scales that its group's rms suggests.
    "fast": TrellisLdlqRecipe(window=(0, 1), beam=1750),
    "default": TrellisLdlqRecipe(),
    "best": TrellisLdlqRecipe(kappas=(11.0, 9.0), window=(-2, 3), beam=4000, sweeps=3),
}


def pack(found: dict[str, np.ndarray], prepared: Prepared) -> dict[str, np.ndarray]:
    """The stored tensors of the result of the core or of the reference."""
    return data_free.pack(unscaled(found, prepared))


class TrellisLdlqEncoder(LdlqEncoder):
    """See LdlqEncoder; `data_free` encodes the matrices for which `hessians` returns None."""

    format = trellis.NAME

    def __init__(
        self,
        preset: str,
        threads: int,
        hessians: Hessians,
        data_free: MatrixEncoder,
        *,
        isa: str = "auto",
        recipe: TrellisLdlqRecipe | None = None,
    ) -> None:
        super().__init__(preset, threads, hessians, data_free, isa=isa)
        self._recipe = recipe or TRELLIS_LDLQ_RECIPES[preset]

    def metric_of(self, hessian: np.ndarray) -> TrellisMetric | None:
        """The metric of a Hessian, or None for one of zeros."""
        return make_trellis_metric(hessian, self._recipe.damping)

    def _pack(self, found: dict[str, np.ndarray], prepared: Prepared) -> dict[str, np.ndarray]:
        return pack(found, prepared)

    def _find(self, prepared: Prepared, metric: TrellisMetric) -> dict[str, np.ndarray]:
        from ..compiled import core as _core

        return _core.trellis_ldlq(
            prepared.weight,
            metric.as_dict(),
            prepared.supers,
            self._recipe.as_dict(),
            self._threads,
            self._isa,
        )
