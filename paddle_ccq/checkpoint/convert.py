# SPDX-License-Identifier: Apache-2.0
"""One matrix from its float values to the tensors that every rank stores, with its error."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..codec import formats
from ..encoder.base import ErrorStats, MatrixEncoder
from ..errors import CcqError
from .plan import Item, Plan
from .reader import Checkpoint
from .safetensors_format import DTYPES
from .tensor_parallel import take

# Values looked at in one go when searching for NaN and infinity; bounds the mask's memory.
_CHUNK = 1 << 24
_BF16_EXPONENT = np.uint16(0x7F80)
# In these formats output columns are independent in blocks of SLICE_COLUMNS and lie first in every
# stored tensor, so wide matrices are encoded in slices: the encoder's copies stay small.
SLICED_FORMATS = ("wint8", "wint4")
SLICE_WEIGHTS = 1 << 24
SLICE_COLUMNS = 16


@dataclass(frozen=True)
class Converted:
    """The tensors of one matrix by full name, one map a rank, and what is recorded of it."""

    parts: list[dict[str, np.ndarray]]
    stats: dict[str, Any]


class Converter:
    """Reads, checks, cuts, re-orders and encodes matrices as the plan says."""

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

    def convert(self, item: Item) -> Converted:
        """The stored tensors of one matrix; holds no more than that matrix."""
        start = time.perf_counter()
        if item.quantized:
            weight = self.checkpoint.read_out_in(item.name)
        else:
            weight = self.checkpoint.read_stored(item.name)
        weight, nonfinite = self._finite(weight, item.name)
        read = time.perf_counter()
        parts, error = self._encoded(item, weight) if item.quantized else self._kept(item, weight)
        stats: dict[str, Any] = {
            "format": item.format,
            "shape": list(item.shape),
            "bpw": 8 * item.rank_bytes * len(parts) / item.weights,
            **error,
            "read_seconds": read - start,
            "seconds": time.perf_counter() - read,
        }
        if nonfinite:
            stats["nonfinite_set_to_zero"] = nonfinite
        return Converted(parts, stats)

    def _finite(self, weight: np.ndarray, name: str) -> tuple[np.ndarray, int]:
        """The weight without NaN and infinity, and how many there were; refuses them by default."""
        bad = count_nonfinite(weight)
        if not bad:
            return weight, 0
        if not self.allow_nonfinite:
            raise CcqError(
                f"{self.checkpoint.path}: {name} holds {bad} values that are NaN or infinite; the"
                " file is damaged (--allow-nonfinite would set them to 0)"
            )
        clean = np.where(np.isfinite(weight), weight, np.zeros((), weight.dtype))
        return clean, bad

    def _kept(
        self, item: Item, weight: np.ndarray
    ) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]]:
        ((name, dtype, shape),) = item.specs
        size = self.plan.tensor_parallel_size
        parts = []
        for rank in range(size):
            part = take(weight, item.cut, rank, size).astype(DTYPES[dtype], copy=False)
            parts.append({name: part.reshape(shape)})
        return parts, {}

    def _encoded(
        self, item: Item, weight: np.ndarray
    ) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]]:
        size = self.plan.tensor_parallel_size
        stem = item.name.removesuffix(".weight")
        parts, found = [], []
        said: list[dict[str, float]] = []
        every_row = np.arange(item.shape[0])
        for rank in range(size):
            part = take(weight, item.cut, rank, size, transposed=True)
            rows = every_row
            if item.cut is not None and item.cut.axis == 0:
                rows = take(every_row, item.cut, rank, size)
            order = self.plan.row_order
            part = np.ascontiguousarray(formats.order_rows(part, item.format, order, axis=1))
            rows = formats.order_rows(rows, item.format, order)
            tensors, stats, measures = self._encode(item, part, rows)
            said.append(measures)
            parts.append({f"{stem}.{suffix}": array for suffix, array in tensors.items()})
            found += stats
        # Sums over all pieces, so that the error is that of the whole matrix.
        whole = ErrorStats(
            sum(s.energy for s in found),
            sum(s.dot for s in found),
            sum(s.energy_encoded for s in found),
        )
        return parts, {"rel_mse": whole.rel_mse, "cosine": whole.cosine, **_means(said)}

    def _encode(
        self, item: Item, weight: np.ndarray, rows: np.ndarray
    ) -> tuple[dict[str, np.ndarray], list[ErrorStats], dict[str, float]]:
        encoder = self.encoders[item.format]
        if formats.get(item.format).kind is not formats.Kind.INTEGER:
            encoded = encoder.encode(weight, item.name, rows)
            return encoded.tensors, [encoded.stats], encoded.measures
        step = max(1, SLICE_WEIGHTS // weight.shape[1] // SLICE_COLUMNS) * SLICE_COLUMNS
        pieces = [
            encoder.encode(weight[begin : begin + step], item.name, rows)
            for begin in range(0, weight.shape[0], step)
        ]
        tensors = {
            suffix: np.concatenate([piece.tensors[suffix] for piece in pieces])
            for suffix in pieces[0].tensors
        }
        return tensors, [piece.stats for piece in pieces], {}


def _means(said: list[dict[str, float]]) -> dict[str, float]:
    """What the encoder said of each rank's part, averaged."""
    return {key: sum(measures[key] for measures in said) / len(said) for key in said[0]}


def count_nonfinite(values: np.ndarray) -> int:
    """How many values are NaN or infinite."""
    flat = values.reshape(-1)
    count = 0
    for begin in range(0, flat.size, _CHUNK):
        chunk = flat[begin : begin + _CHUNK]
        if chunk.dtype == DTYPES["BF16"]:
            exponent = chunk.view(np.uint16) & _BF16_EXPONENT
            count += int(np.count_nonzero(exponent == _BF16_EXPONENT))
        else:
            count += chunk.size - int(np.count_nonzero(np.isfinite(chunk)))
    return count


def energy(values: np.ndarray) -> float:
    """Sum of squares, summed in float64 by rows."""
    return float(sum(np.dot(row, row).astype(np.float64) for row in values))
