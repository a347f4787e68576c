# SPDX-License-Identifier: Apache-2.0
"""The choices of a run that the plan does not hold, for the model card."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """The choices of a run that the plan does not hold."""

    source_model: str
    preset: str
    encoder: str
    # Text, hash, tokens and settings of the calibration (paddle_ccq.calibration); None: data-free.
    calibration: dict[str, Any] | None = None
    # Target, method and predicted loss (paddle_ccq.allocation); None: a prefix, or rules alone.
    allocation: dict[str, Any] | None = None
    # Hub id of the source; None: it is known by a folder's name only.
    base_model: str | None = None
    # What source_card.read_source_card found.
    source_card: dict[str, Any] = field(default_factory=dict)
