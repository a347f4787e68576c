# SPDX-License-Identifier: Apache-2.0
"""The choices that choices.py measures: ways to choose codes, and ways to tune."""

from __future__ import annotations

from dataclasses import dataclass

SHRINKAGE = 256
# Output channels whose gradients are told apart, at most.
GROUPS = 8


@dataclass(frozen=True)
class Choice:
    """One way to choose codes.

    Attributes:
        parts: of the text: "a" 256 windows, "b" the other ones, "m" 128k made-up tokens.
        weights: "router"; "gradient", alike for all output channels of a matrix; "halves", gate
            and up apart; "groups", eight groups of channels; "root", the root of gradient times
            router weight.
        rotated: turn the residual stream by a random orthogonal matrix, norm gains folded in.
        even: scale input rows to equal size, through the norms and the up projections.
    """

    parts: str = "ab"
    weights: str = "router"
    damping: float = 0.01
    preset: str = "default"
    rotated: bool = False
    even: str = ""


CODES = {
    "256k tokens": Choice("a"),
    "all 1.1M tokens (the rows below: too)": Choice(),
    "and 128k made up": Choice("abm"),
    "damping 5 %": Choice(damping=0.05),
    "damping 20 %": Choice(damping=0.2),
    "preset best": Choice(preset="best"),
    "residual stream rotated": Choice(rotated=True),
    "down inputs of even size": Choice(even="down"),
    "down and up inputs of even size": Choice(even="down and up"),
    "tokens by gradient": Choice(weights="gradient"),
    "tokens by gradient, 256k tokens": Choice("a", weights="gradient"),
    "by gradient, gate and up apart": Choice(weights="halves"),
    "by gradient, 8 groups of channels": Choice(weights="groups"),
    "by root of gradient and router weight": Choice(weights="root"),
    "by gradient, and 128k made up": Choice("abm", weights="gradient"),
    "the same, preset best, inputs even": Choice(
        "abm", weights="gradient", preset="best", even="down and up"
    ),
}
TUNED_CODES = "by gradient, and 128k made up"


@dataclass(frozen=True)
class Way:
    """One way to tune: `windows` of the text, evenly spread, and the made-up ones."""

    windows: int
    passes: int = 1
    batch: int = 4
    rate: float = 3e-3
    dense: float = 1e-3
    embedding: float = 0.0
    codes: float = 0.0


ALL = 1 << 30
TUNING = {
    "256k tokens": Way(128),
    "640k tokens": Way(512),
    "all 1.2M tokens": Way(ALL),
    "all, twice": Way(ALL, passes=2),
    "all, four times": Way(ALL, passes=4),
    "640k tokens, batch 1": Way(512, batch=1),
    "640k tokens, rates x 2": Way(512, rate=6e-3, dense=2e-3),
    "640k tokens, rates / 2": Way(512, rate=1.5e-3, dense=5e-4),
    "640k tokens, embedding too (rate 0.001)": Way(512, embedding=1e-3),
    "640k tokens, codes too (rate 0.01)": Way(512, codes=1e-2),
    "640k tokens, codes too (rate 0.02)": Way(512, codes=2e-2),
}
