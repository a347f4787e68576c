# SPDX-License-Identifier: Apache-2.0
"""The interface of encoders and the result that they return."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..codec import formats

PRESETS = ("fast", "default", "best")
ENCODERS = ("search", "paper", "paper-literal")
DEVICES = ("cpu", "gpu")


@dataclass(frozen=True)
class ErrorStats:
    """The distance of the encoded matrix from the float one, as sums over all weights.

    Attributes:
        energy: sum of w**2.
        dot: sum of w * w'.
        energy_encoded: sum of w'**2, w' being what the decoder returns in float32.
    """

    energy: float
    dot: float
    energy_encoded: float

    @property
    def squared_error(self) -> float:
        """||W - W'||^2; never negative."""
        return max(0.0, self.energy - 2 * self.dot + self.energy_encoded)

    @property
    def rel_mse(self) -> float:
        """||W - W'||^2 / ||W||^2; 0 for a matrix of zeros."""
        return self.squared_error / self.energy if self.energy else 0.0

    @property
    def cosine(self) -> float:
        """Cosine of the angle between W and W'; 1 when either is all zeros."""
        # Python's floats: sums of values that are too large are infinite, without a warning.
        norm = math.sqrt(self.energy) * math.sqrt(self.energy_encoded)
        return float(self.dot) / norm if norm else 1.0

    @classmethod
    def between(cls, weight: np.ndarray, encoded: np.ndarray) -> ErrorStats:
        """The statistics of two arrays of one shape."""
        w, e = weight.ravel().astype(np.float64), encoded.ravel().astype(np.float64)
        return cls(float(w @ w), float(w @ e), float(e @ e))


@dataclass(frozen=True)
class Encoded:
    """A matrix in its stored form: suffix -> array (formats.tensor_specs), and its error.

    `metrics` holds further numbers of the encoder by name; the journal records them.
    """

    tensors: dict[str, np.ndarray]
    stats: ErrorStats
    metrics: dict[str, float] = field(default_factory=dict)


class MatrixEncoder(Protocol):
    """Turns one float matrix into the stored tensors of one format.

    The writer knows nothing else of an encoder. One that weighs errors by activation statistics
    finds those of the matrix by its name; format and writer do not change with the metric.
    """

    format: str

    def encode(self, weight: np.ndarray, name: str = "", rows: np.ndarray | None = None) -> Encoded:
        """Encode float32 [N, K] = [out, in], C-contiguous, finite, rows of K in stored order.

        `rows` [K] holds the input row of the named matrix that each of them is, where they are not
        all of it in plain order.

        Raises:
            ValueError: if the format cannot hold the shape.
        """
        ...


class ChannelEncoder:
    """A data-free MatrixEncoder whose search returns every channel's words, scales and sums."""

    format: str

    def encode(self, weight: np.ndarray, name: str = "", rows: np.ndarray | None = None) -> Encoded:
        """See MatrixEncoder.encode."""
        problem = formats.shape_problem(self.format, weight.shape[1], weight.shape[0])
        if problem:
            raise ValueError(problem)
        found = self._search(np.ascontiguousarray(weight, dtype=np.float32))
        # Channels are summed in order, so that the statistics, too, are reproducible.
        stats = ErrorStats(*(float(total) for total in found["sums"].sum(axis=0)))
        return Encoded(self._pack(found), stats)

    def _search(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        """What the search finds for float32 [N, K]; "sums" [N, 3] are ErrorStats' of a channel."""
        raise NotImplementedError

    def _pack(self, found: dict[str, np.ndarray]) -> formats.Tensors:
        """The stored tensors of what was found."""
        raise NotImplementedError
