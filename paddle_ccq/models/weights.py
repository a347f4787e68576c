# SPDX-License-Identifier: Apache-2.0
"""Where a model's weights come from: anything with a config and a read-by-name function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from ..checkpoint.reader import Checkpoint
from ..errors import CcqError

EXACT, BFLOAT16 = "exact", "bfloat16"
# What packed weights may be read as; evaluate's --weights explains them.
READINGS = (EXACT, BFLOAT16)


class WeightSource(Protocol):
    """A checkpoint, or something that looks like one; names are the canonical ones."""

    config: Any

    def read(self, name: str) -> np.ndarray:
        """The named weight as float32, matrices as [in, out]."""
        ...


class ExactWeights:
    """A checkpoint whose packed matrices are read exactly.

    Checkpoint.read() rounds decoded weights to bfloat16, as an engine that multiplies in bfloat16
    sees them. The packed products of paddle_ccq.ops decode exactly; this is the float model they
    stand for.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config

    def read(self, name: str) -> np.ndarray:
        """The named weight as float32, matrices as [in, out]."""
        return self.checkpoint.read(name, "float32")


def weight_source(checkpoint: Checkpoint, reading: str) -> WeightSource:
    """The checkpoint with packed weights read as `reading` says, one of READINGS.

    Raises:
        CcqError: for another word.
    """
    if reading not in READINGS:
        raise CcqError(f"--weights {reading}: must be one of {', '.join(READINGS)}")
    return checkpoint if reading == BFLOAT16 else ExactWeights(checkpoint)


class OverriddenWeights:
    """Another source with some weights replaced, for trying a quantizer without writing files.

    `replacements` maps canonical names to arrays, or to functions that return one (called on
    each read, so that a large set need not be in memory at once).
    """

    def __init__(self, base: WeightSource, replacements: Mapping[str, Any]) -> None:
        self.base = base
        self.config = base.config
        self.replacements = replacements

    def read(self, name: str) -> np.ndarray:
        """The replacement as float32, or what the base source reads."""
        if name not in self.replacements:
            return self.base.read(name)
        value = self.replacements[name]
        return np.asarray(value() if callable(value) else value, dtype=np.float32)
