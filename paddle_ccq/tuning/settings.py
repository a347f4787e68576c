# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint is tuned. All settings are part of the result's provenance."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..calibration.settings import DEFAULT_TOKENS, DEFAULT_WINDOW
from ..errors import CcqError


@dataclass(frozen=True)
class TuningSettings:
    """The choices of a tuning run.

    Attributes:
        tokens: at most this many tokens of the text, in windows spread evenly over it; every
            `held_out`-th window is kept for measuring and never learned from.
        passes: how often each of the other windows is used.
        batch: windows of one step.
        learning_rate: of column factors, norm gains and routers, relative to their size.
        dense_learning_rate: of dense matrices. Their entries are many and add up in every output,
            so it is smaller; 0 leaves them alone.
        checks: how often the held-out loss is measured on the way; the best state is kept.
    """

    tokens: int = DEFAULT_TOKENS
    window: int = DEFAULT_WINDOW
    passes: int = 1
    batch: int = 4
    learning_rate: float = 3e-3
    dense_learning_rate: float = 1e-3
    held_out: int = 16
    checks: int = 4
    seed: int = 0

    def check(self) -> None:
        """Refuse values that cannot work, naming the flag."""
        for flag, value in (("--passes", self.passes), ("--batch", self.batch)):
            if value < 1:
                raise CcqError(f"{flag} {value}: must be at least 1")
        for flag, rate in (
            ("--learning-rate", self.learning_rate),
            ("--dense-learning-rate", self.dense_learning_rate),
        ):
            # Above this a single step changes a weight by more than its own size.
            if not 0 <= rate <= 1:
                raise CcqError(f"{flag} {rate}: must be between 0 and 1")

    def as_dict(self) -> dict[str, Any]:
        """For config.json."""
        return asdict(self)
