# SPDX-License-Identifier: Apache-2.0
"""How statistics are taken. All settings are part of a checkpoint's provenance."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import CcqError

DEFAULT_TOKENS = 256 * 1024
# Long enough for attention to see real contexts; a common length of calibration sequences is 2048,
# but what counts here is how many different documents are seen.
DEFAULT_WINDOW = 1024
# The factor of each token's x. ROUTER: the token's routing weight for the expert. GRADIENT: the
# size of the gradient at the matrix' outputs (token_weights.py). EQUAL: one.
ROUTER, GRADIENT, EQUAL = "router", "gradient", "equal"
TOKEN_WEIGHTS = (ROUTER, GRADIENT, EQUAL)
_UNITS = {"": 1, "k": 1024, "m": 1024**2}


@dataclass(frozen=True)
class CalibrationSettings:
    """The choices of a calibration.

    Attributes:
        tokens: at most this many tokens of the text, in windows spread evenly over it.
        window: tokens that attend to each other.
        token_weights: one of TOKEN_WEIGHTS. An expert's output, and so its error, is multiplied by
            its routing weight: to first order that is the error that reaches the residual stream.
            The gradient tells how much of it reaches the model's answer, and costs another two
            passes through the model.
        shrinkage_tokens: an expert's statistics are mixed with the layer's pooled ones as if these
            were that many more tokens. 256 is small against the thousands that an expert normally
            gets and decides only where there are few; it was set beforehand and not fitted.
    """

    tokens: int = DEFAULT_TOKENS
    window: int = DEFAULT_WINDOW
    token_weights: str = ROUTER
    shrinkage_tokens: int = 256

    def as_dict(self) -> dict[str, Any]:
        """For config.json and the journal."""
        return asdict(self)


def parse_tokens(text: str | int, flag: str = "--calibration-tokens") -> int:
    """A number of tokens: 65536, "64k" (k is 1024), "1M".

    Raises:
        CcqError: for anything else.
    """
    found = re.fullmatch(r"(\d+)([km]?)", str(text).strip().lower())
    if not found or int(found[1]) < 1:
        raise CcqError(f"{flag} {text}: not a number of tokens such as 65536 or 256k")
    return int(found[1]) * _UNITS[found[2]]
