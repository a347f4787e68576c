# SPDX-License-Identifier: Apache-2.0
"""How sensitivities are measured, and how much memory that takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.text import spread
from .costs import PROJECTIONS

Progress = Callable[[int, int], None]  # layers done, of how many


@dataclass(frozen=True)
class Execution:
    """With what sensitivities are measured. No attribute changes the measured numbers.

    Attributes:
        threads: of the encoders and of the model.
        device: where codes are searched, "cpu" or "gpu"; the model runs on the CPU.
        folder: for a file of states that do not fit in memory; None keeps them there.
    """

    threads: int
    device: str = "cpu"
    folder: Path | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class Probing:
    """How sensitivities are measured. Every attribute changes the measured numbers.

    Attributes:
        method: "quadratic" or "kl".
        formats: the formats to measure.
        preset: the preset of the encoders. The order of the layers hardly depends on it.
        statistics: at most this many tokens of the text are used. wint2's Hessians are taken on
            those that nothing is measured on. It is enough to tell layers apart; encoding itself
            takes more.
        tokens: this many of them are measured on, so their hidden states are copied and perturbed.
        experts: how many experts of each layer are encoded for "quadratic"; "kl" needs all.
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
    """Windows to measure on, at most `tokens` in all and evenly spread, and the others.

    The statistics are taken on the others. On the text that its statistics come from, calibrated
    wint2 looks better than it is, by a third on the 42M model; so a window is used for both only
    where there is no other.
    """
    longest = max(window.size for window in windows)
    count = min(max(1, tokens // longest), max(1, len(windows) // 2))
    chosen = set(spread(len(windows), count))
    rest = [window for i, window in enumerate(windows) if i not in chosen]
    return [windows[i] for i in sorted(chosen)], rest or list(windows)


def perturbed_count(probing: Probing, layers: int) -> int:
    """How many perturbed copies of the hidden states a measurement has after the last layer."""
    parts = len(PROJECTIONS) if probing.method == "kl" else 1
    return layers * parts * len(probing.formats)


def perturbed_bytes(copies: int, tokens: int, hidden: int) -> int:
    """Bytes of that many copies of the hidden states in float32."""
    return 4 * copies * tokens * hidden
