# SPDX-License-Identifier: Apache-2.0
"""One matrix from its float values to the tensors that every rank stores, with its error."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..codec import formats
from ..encoder.base import ErrorStats, MatrixEncoder
from ..encoder.paper import PaperEncoder
from ..errors import CcqError
from .plan import Plan
from .planned import KEPT, PlannedTensor
from .reader import Checkpoint
from .safetensors_format import DTYPES, FLOAT_DTYPES
from .sources.stored import StoredWeight
from .tensor_parallel import take
from .values import count_nonfinite, energy, finite, is_approximation

# In integer formats output columns are independent in blocks of SLICE_COLUMNS and lie first in
# every stored tensor, so wide matrices are encoded in slices: the encoder's copies stay small.
SLICE_WEIGHTS = 1 << 24
SLICE_COLUMNS = 16
_FLOATS = tuple(DTYPES[name] for name in FLOAT_DTYPES)


@dataclass(frozen=True)
class Converted:
    """The tensors of one matrix by full name, one map per rank, and its statistics."""

    parts: list[dict[str, np.ndarray]]
    stats: dict[str, Any]


class Converter:
    """Reads, checks, cuts, re-orders and encodes matrices according to the plan."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        encoders: Mapping[str, MatrixEncoder],
        allow_nonfinite: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.encoders = encoders
        self.allow_nonfinite = allow_nonfinite

    def convert(self, planned: PlannedTensor) -> Converted:
        """The stored tensors of one matrix; no other matrix is in memory."""
        start = time.perf_counter()
        if planned.format == KEPT:
            return self._kept(planned)
        if planned.quantized:
            weight = self.checkpoint.read_out_in(planned.name)
        else:
            weight = self.checkpoint.read_stored(planned.name)
        # Engines decode every packed format to bfloat16.
        stored_as = "BF16" if planned.quantized else planned.specs[0][1]
        weight, nonfinite = self._finite(weight, planned.name, stored_as)
        read = time.perf_counter()
        parts, error = (
            self._encoded(planned, weight)
            if planned.quantized
            else self._unquantized(planned, weight)
        )
        self._check_finite(planned, parts, error, weight)
        if planned.quantized and not self._taken_literally(planned):
            self._check_error(planned, error, weight)
        stats: dict[str, Any] = {
            "format": planned.format,
            "shape": list(planned.shape),
            "bpw": 8 * planned.rank_bytes * len(parts) / planned.weights,
            **error,
            "read_seconds": read - start,
            "seconds": time.perf_counter() - read,
        }
        if nonfinite:
            stats["nonfinite_set_to_zero"] = nonfinite
        return Converted(parts, stats)

    def _kept(self, planned: PlannedTensor) -> Converted:
        """The tensors as the source has them; parts of another naming are put together anew."""
        start = time.perf_counter()
        tensors, zeroed = self.checkpoint.read_kept(planned.name, planned.specs), 0
        for part in self.checkpoint.parts(planned.name):
            if not part.is_float:
                zeroed += self._finite_scaled(part, tensors)
        for name, dtype, _ in planned.specs:
            if dtype in FLOAT_DTYPES:
                tensors[name], nonfinite = self._finite(tensors[name], name, dtype)
                zeroed += nonfinite
        stats: dict[str, Any] = {
            "format": KEPT,
            "shape": list(planned.shape),
            "bpw": 8 * planned.rank_bytes / planned.weights if planned.weights else 0.0,
            "read_seconds": time.perf_counter() - start,
            "seconds": 0.0,
        }
        if zeroed:
            stats["nonfinite_set_to_zero"] = zeroed
        return Converted([tensors], stats)

    def _finite_scaled(self, part: StoredWeight, tensors: dict[str, np.ndarray]) -> int:
        """Set to 0 what is not finite once scaled, if that is allowed, and count it.

        A scale that no weight can have is refused as where the weight is encoded.
        """
        wrong = part.nonfinite()
        if wrong is None:
            return 0
        count = int(wrong.sum())
        name = part.values.name
        codes = tensors.get(name)
        if not self.allow_nonfinite or codes is None or codes.shape != wrong.shape:
            raise CcqError(
                f"{part.values.where} holds {count} values that are NaN or infinite, the first in"
                f" {part.nonfinite_place()}; the file is damaged (--allow-nonfinite would set those"
                " of FP8 to 0)"
            )
        tensors[name] = np.where(wrong, np.zeros((), codes.dtype), codes)
        return count

    def _finite(self, weight: np.ndarray, name: str, stored_as: str) -> tuple[np.ndarray, int]:
        """The weight with 0 for values that cannot be stored, and their number.

        By default such values are refused.
        """
        clean, bad = finite(weight, stored_as)
        if not bad or self.allow_nonfinite:
            return clean, bad
        where = f"{self.checkpoint.path}: {name}"
        damaged = count_nonfinite(weight)
        if damaged:
            place = self.checkpoint.nonfinite_place(name)
            first = f", the first in {place}" if place else ""
            raise CcqError(
                f"{where} holds {damaged} values that are NaN or infinite{first}; the file is"
                " damaged (--allow-nonfinite would set them to 0)"
            )
        largest = float(np.abs(weight).max())
        raise CcqError(
            f"{where} holds {bad} values beyond bfloat16's range, up to {largest:.7g} in magnitude;"
            " they would be stored as infinity (--allow-nonfinite would set them to 0)"
        )

    def _check_finite(
        self,
        planned: PlannedTensor,
        parts: list[dict[str, np.ndarray]],
        error: dict[str, Any],
        weight: np.ndarray,
    ) -> None:
        """Refuse tensors that verify would refuse: too large values give infinite scales."""
        broken = [
            name
            for tensors in parts
            for name, array in tensors.items()
            if array.dtype in _FLOATS and count_nonfinite(array)
        ]
        if broken or not all(math.isfinite(value) for value in error.values()):
            raise CcqError(
                f"{self.checkpoint.path}: {planned.name} cannot be stored as {planned.format}: its"
                f" values reach {float(np.abs(weight).max()):.7g}, too large for"
                f" {broken[0] if broken else 'the search'}; the file is damaged"
            )

    def _taken_literally(self, planned: PlannedTensor) -> bool:
        """The paper's text taken literally is there for comparison: its error is to be seen."""
        encoder = self.encoders[planned.format]
        return isinstance(encoder, PaperEncoder) and encoder.literal

    def _check_error(
        self, planned: PlannedTensor, error: dict[str, Any], weight: np.ndarray
    ) -> None:
        """A matrix that `verify` would take for another one is not written."""
        limit = formats.get(planned.format).largest_error
        if is_approximation(error["rel_mse"], weight, limit):
            return
        largest = float(np.abs(weight).max())
        typical = math.sqrt(energy(weight) / weight.size)
        raise CcqError(
            f"{self.checkpoint.path}: {planned.name} cannot be stored as {planned.format}: rel-MSE"
            f" {error['rel_mse']:.3g} is more than {limit:g}; its largest value, {largest:.7g}, is"
            f" {largest / typical:.3g} times the root mean square: the file is damaged, or the"
            " layer needs more bits (--wint4-end-layer, --rules)"
        )

    def _unquantized(
        self, planned: PlannedTensor, weight: np.ndarray
    ) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]]:
        ((name, dtype, shape),) = planned.specs
        size = self.plan.tensor_parallel_size
        parts = []
        for rank in range(size):
            part = take(weight, planned.cut, rank, size).astype(DTYPES[dtype], copy=False)
            parts.append({name: part.reshape(shape)})
        return parts, {}

    def _encoded(
        self, planned: PlannedTensor, weight: np.ndarray
    ) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]]:
        size = self.plan.tensor_parallel_size
        names = {name.rpartition(".")[2]: name for name, _, _ in planned.specs}
        parts, found = [], []
        metrics: list[dict[str, float]] = []
        every_row = np.arange(planned.shape[0])
        for rank in range(size):
            part = take(weight, planned.cut, rank, size, transposed=True)
            rows = every_row
            if planned.cut is not None and planned.cut.axis == 0:
                rows = take(every_row, planned.cut, rank, size)
            order = self.plan.row_order
            part = np.ascontiguousarray(formats.order_rows(part, planned.format, order, axis=1))
            rows = formats.order_rows(rows, planned.format, order)
            tensors, stats, part_metrics = self._encode(planned, part, rows)
            metrics.append(part_metrics)
            parts.append({names[suffix]: array for suffix, array in tensors.items()})
            found += stats
        # Sums over all pieces, so that the error is that of the whole matrix.
        whole = ErrorStats(
            sum(s.energy for s in found),
            sum(s.dot for s in found),
            sum(s.energy_encoded for s in found),
        )
        return parts, {"rel_mse": whole.rel_mse, "cosine": whole.cosine, **_means(metrics)}

    def _encode(
        self, planned: PlannedTensor, weight: np.ndarray, rows: np.ndarray
    ) -> tuple[dict[str, np.ndarray], list[ErrorStats], dict[str, float]]:
        encoder = self.encoders[planned.format]
        if formats.get(planned.format).kind is not formats.Kind.INTEGER:
            encoded = encoder.encode(weight, planned.name, rows)
            return encoded.tensors, [encoded.stats], encoded.metrics
        step = max(1, SLICE_WEIGHTS // weight.shape[1] // SLICE_COLUMNS) * SLICE_COLUMNS
        pieces = [
            encoder.encode(weight[begin : begin + step], planned.name, rows)
            for begin in range(0, weight.shape[0], step)
        ]
        tensors = {
            suffix: np.concatenate([piece.tensors[suffix] for piece in pieces])
            for suffix in pieces[0].tensors
        }
        return tensors, [piece.stats for piece in pieces], {}


def _means(metrics: list[dict[str, float]]) -> dict[str, float]:
    """The encoder's metrics, averaged over the parts of the ranks."""
    return {key: sum(part[key] for part in metrics) / len(metrics) for key in metrics[0]}
