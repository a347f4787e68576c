# SPDX-License-Identifier: Apache-2.0
"""--allocate TARGET: bits per expert weight, or bytes of the whole checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..checkpoint.safetensors_format import parse_size
from ..errors import CcqError


@dataclass(frozen=True)
class Target:
    """A size that the result must not exceed. Exactly one of `bits` and `bytes` is set.

    Attributes:
        text: as the user wrote it.
        bits: per weight of routed experts, of codes and group scales, as a format's rate is given
            (2.0625, 4); what is stored once a column comes on top.
        bytes: of all tensors of all ranks.
    """

    text: str
    bits: float | None = None
    bytes: int | None = None


def parse_target(text: str | int) -> Target:
    """ "2.3bpw", "2.3 bpw", "100GB", 100000000000.

    Raises:
        CcqError: for anything else.
    """
    text = str(text).strip()
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*bpw", text, re.IGNORECASE)
    if found:
        return Target(text, bits=float(found[1]))
    if re.fullmatch(r"\d*\.\d+", text) or re.fullmatch(r"\d{1,2}", text):
        raise CcqError(f"--allocate {text}: of what? write {text}bpw, or a size such as 100GB")
    try:
        return Target(text, bytes=parse_size(text))
    except CcqError:
        raise CcqError(
            f"--allocate {text}: neither bits per expert weight (2.3bpw) nor a size (100GB)"
        ) from None
