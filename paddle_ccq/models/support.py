# SPDX-License-Identifier: Apache-2.0
"""Which models this package computes itself; all others are computed by an engine alone."""

from __future__ import annotations

from ..errors import CcqError
from ..families.config import ModelConfig
from ..families.ernie45 import ERNIE45


def require_computed(config: ModelConfig, what: str) -> None:
    """Refuse what needs a model's forward pass where there is none here.

    Args:
        what: the flag or command that asks for it.

    Raises:
        CcqError: for every family but ERNIE-4.5.
    """
    if config.family is not ERNIE45:
        raise CcqError(
            f"{what}: computes the model, which this package does for {ERNIE45.name} alone, not for"
            f" {config.family.name}; quantize, verify and dequantize take it, and"
            " docs/reference/serving-vllm.md says which families vLLM serves"
        )
