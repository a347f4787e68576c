# SPDX-License-Identifier: Apache-2.0
"""The calibrated WINT2 encoder: the same tensors, chosen by the error of the outputs.

For every channel the compiled core (custom_ops/cpu/ldlq.inc) tries code pairs and super scales;
each time it goes through the groups, and in a group tries several local scales, taking words by
error feedback in the metric of their block (ldlq_metric.py). Coordinate descent on words, local and
super scales follows. ldlq_reference.py computes the same in NumPy.

Matrices without statistics go to the data-free encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from ..codec import formats, wint2
from . import layouts
from .base import Encoded, ErrorStats, MatrixEncoder
from .ldlq_metric import InputHessian, LdlqMetric, make_metric, weighted_error
from .recipes import CODE_SCALE, CODE_ZERO_POINTS, CoreRecipe

# Name of a matrix -> its Hessian, or None for a matrix that has none.
Hessians = Callable[[str], InputHessian | None]


@dataclass(frozen=True)
class LdlqRecipe(CoreRecipe):
    """What the calibrated search tries; chosen on synthetic Hessians, not on a model.

    Attributes:
        nominal: best scale of a group as a multiple of its rms, as in recipes.py.
        kappas: one super scale for each: the local scale of a group of average rms.
        window: local scales tried around a group's nominal one, at most 8.
        code_pairs: code zero-points tried per channel.
        keep_pairs: how many code pairs survive a run on nominal scales.
        sweeps: rounds of coordinate descent.
        damping: share of the mean of H's diagonal that is added to it.
    """

    nominal: float = 0.0615
    kappas: tuple[float, ...] = (9.0, 11.0)
    window: tuple[int, int] = (-2, 3)
    code_pairs: int = 16
    keep_pairs: int = 4
    sweeps: int = 4
    damping: float = 0.01


LDLQ_RECIPES: dict[str, LdlqRecipe] = {
    "fast": LdlqRecipe(kappas=(9.0,), window=(-1, 2), code_pairs=4, keep_pairs=1, sweeps=1),
    "default": LdlqRecipe(),
    "best": LdlqRecipe(
        kappas=(9.0, 11.0, 7.0), window=(-3, 4), code_pairs=64, keep_pairs=8, sweeps=8
    ),
}


@dataclass(frozen=True)
class Prepared:
    """Channels scaled to about unit rms for the search, and the super scales to try."""

    weight: np.ndarray  # float32 [N, K]
    supers: np.ndarray  # float32 [candidates, N], bfloat16 values
    exponents: np.ndarray  # int [N]: the channel is weight * 2^exponent
    dead: np.ndarray  # bool [N]: stored as zeros


def prepare(weight: np.ndarray, recipe: LdlqRecipe) -> Prepared:
    """Scale channels by powers of two (which is exact), so that no square leaves float32."""
    rms = np.sqrt(np.mean(np.square(weight, dtype=np.float64), axis=1))
    # Below this a super scale would be subnormal as bfloat16.
    dead = rms < 2.0**-100
    exponents = np.where(dead, 0, np.frexp(np.where(dead, 1.0, rms))[1])
    scaled = np.ldexp(np.where(dead[:, None], 0, weight), -exponents[:, None]).astype(np.float32)
    unit = np.where(dead, 1.0, np.ldexp(rms, -exponents))
    kappas = np.array(recipe.kappas)[:, None]
    supers = (recipe.nominal * unit / kappas).astype(np.float32)
    supers = supers.astype(ml_dtypes.bfloat16).astype(np.float32)
    return Prepared(np.ascontiguousarray(scaled), supers, exponents, dead)


def unscaled(found: dict[str, np.ndarray], prepared: Prepared) -> dict[str, np.ndarray]:
    """Words, scales and supers for the weights as they came: channels of zeros are 0."""
    words, scales = found["words"].copy(), found["scales"].copy()
    words[prepared.dead], scales[prepared.dead] = 0, 0
    supers = np.where(prepared.dead, 0, np.ldexp(found["supers"], prepared.exponents))
    return {"words": words, "scales": scales, "supers": supers}


def pack(found: dict[str, np.ndarray], prepared: Prepared) -> dict[str, np.ndarray]:
    """The stored tensors of the result of the core or of the reference."""
    values = unscaled(found, prepared)
    words = values["words"].reshape(prepared.dead.size, -1, 16)
    supers = values["supers"].astype(np.float32)
    return layouts.pack_wint2(words, values["scales"], supers, found["pairs"])


def books(count: int) -> np.ndarray:
    """Decodable vectors of the first pairs, by coordinate: float32 [pairs, 4, 256]."""
    return np.stack(
        [wint2.codebook(CODE_SCALE, zp).T.astype(np.float32) for zp in CODE_ZERO_POINTS[:count]]
    )


class LdlqEncoder:
    """See MatrixEncoder; `data_free` encodes the matrices for which `hessians` returns None."""

    format = "wint2"

    def __init__(
        self,
        preset: str,
        threads: int,
        hessians: Hessians,
        data_free: MatrixEncoder,
        *,
        isa: str = "auto",
        recipe: LdlqRecipe | None = None,
    ) -> None:
        self._recipe = recipe or LDLQ_RECIPES[preset]
        self._threads = threads
        self._hessians = hessians
        self._data_free = data_free
        self._isa = isa
        self._books = books(self._recipe.code_pairs)

    def encode(self, weight: np.ndarray, name: str = "", rows: np.ndarray | None = None) -> Encoded:
        """See MatrixEncoder.encode; the error relative to the outputs is reported as well."""
        n, k = weight.shape
        problem = formats.shape_problem(self.format, k, n)
        if problem:
            raise ValueError(problem)
        known = self._hessians(name)
        hessian = known.matrix if known else None
        if hessian is not None and rows is not None:
            hessian = hessian[np.ix_(rows, rows)]
        metric = self.metric_of(hessian) if hessian is not None else None
        if known is None or metric is None:
            encoded = self._data_free.encode(weight, name, rows)
            return Encoded(encoded.tensors, encoded.stats, {"calibration_tokens": 0})
        tensors = self.search(weight, metric)
        decoded = formats.decode(self.format, tensors, "float32").T
        output = weighted_error(weight, hessian)
        lost = weighted_error(weight - decoded, hessian)
        return Encoded(
            tensors,
            ErrorStats.between(weight, decoded),
            {
                "output_rel_mse": lost / output if output else 0.0,
                "output_error": lost,
                "calibration_tokens": known.tokens,
            },
        )

    def metric_of(self, hessian: np.ndarray) -> LdlqMetric | None:
        """The metric of a Hessian, or None for one of zeros."""
        return make_metric(hessian, self._recipe.damping)

    def search(self, weight: np.ndarray, metric: LdlqMetric) -> dict[str, np.ndarray]:
        """The stored tensors of float32 [N, K] under a metric."""
        prepared = prepare(weight, self._recipe)
        return self._pack(self._find(prepared, metric), prepared)

    def _pack(self, found: dict[str, np.ndarray], prepared: Prepared) -> dict[str, np.ndarray]:
        return pack(found, prepared)

    def _find(self, prepared: Prepared, metric: LdlqMetric) -> dict[str, np.ndarray]:
        from ..compiled import core as _core

        return _core.ldlq(
            prepared.weight,
            metric.as_dict(),
            self._books,
            prepared.supers,
            self._recipe.as_dict(),
            self._threads,
            self._isa,
        )
