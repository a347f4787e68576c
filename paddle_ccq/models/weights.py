# SPDX-License-Identifier: Apache-2.0
"""Where a model's weights come from: anything with a config and a read-by-name function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class WeightSource(Protocol):
    """A checkpoint, or something that looks like one; names are the canonical ones."""

    config: Any

    def read(self, name: str) -> np.ndarray:
        """The named weight as float32, matrices as [in, out]."""
        ...


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
        if name not in self.replacements:
            return self.base.read(name)
        value = self.replacements[name]
        return np.asarray(value() if callable(value) else value, dtype=np.float32)
