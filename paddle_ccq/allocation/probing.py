# SPDX-License-Identifier: Apache-2.0
"""How sensitivities are measured, and what that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..evaluation.text import spread
from .costs import PROJECTIONS


@dataclass(frozen=True)
class Probing:
    """How sensitivities are measured; all of it decides the numbers.

    Attributes:
        method: "quadratic" or "kl".
        formats: to measure.
        preset: of the encoders. Ranks hardly depend on it.
        statistics: tokens of the text to use, at most; wint2's Hessians are taken of those
            that nothing is measured on. Enough to tell layers apart; encoding itself takes more.
        tokens: of them, to measure on: copies are made of these.
        experts: of each layer that are encoded for "quadratic"; "kl" needs all.
    """

    method: str
    formats: tuple[str, ...]
    preset: str = "fast"
    statistics: int = 64 * 1024
    tokens: int = 8 * 1024
    experts: int = 16

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file and the journal."""
        found = {**asdict(self), "formats": list(self.formats)}
        if self.method == "kl":
            found.pop("experts")
        return found


def held_out(
    windows: Sequence[np.ndarray], tokens: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(to measure on, at most `tokens` in all; for statistics), evenly spread.

    On the text that its statistics are of, calibrated wint2 looks better than it is, by a third on
    the 42M model; so the two share a window only where there is but one.
    """
    longest = max(window.size for window in windows)
    count = min(max(1, tokens // longest), max(1, len(windows) // 2))
    chosen = set(spread(len(windows), count))
    rest = [window for i, window in enumerate(windows) if i not in chosen]
    return [windows[i] for i in sorted(chosen)], rest or list(windows)


def copies_of(probing: Probing, layers: int) -> int:
    """How many copies of the states a measurement keeps in the end."""
    parts = len(PROJECTIONS) if probing.method == "kl" else 1
    return layers * parts * len(probing.formats)


def copies_bytes(copies: int, tokens: int, hidden: int) -> int:
    """What that many copies of the hidden states take, as float32."""
    return 4 * copies * tokens * hidden
