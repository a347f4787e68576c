# SPDX-License-Identifier: Apache-2.0
"""The options of a quantization and the results of its stages so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..allocation.costs import Sensitivities
from ..allocation.resolve import Allocation
from ..allocation.session import AllocationRequest
from ..calibration.session import CalibrationRequest
from ..families.config import ModelConfig
from .options import PathLike, QuantizeOptions


@dataclass
class Job:
    """One quantization on its way through the stages.

    Attributes:
        source: the model's folder on this machine.
        notes: what was assumed of the model's config.
        costs: the sensitivities of a file; None where they are measured, or nothing is allocated.
    """

    model: PathLike
    options: QuantizeOptions
    say: Callable[[str], object]
    calibration: CalibrationRequest | None
    wanted: AllocationRequest | None
    source: Path = field(default_factory=Path)
    config: ModelConfig | None = None
    notes: tuple[str, ...] = ()
    costs: Sensitivities | None = None
    allocation: Allocation | None = None
