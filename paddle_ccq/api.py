# SPDX-License-Identifier: Apache-2.0
"""The Python API: one function a command, each imported when first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dequantize import dequantize
    from .evaluate import evaluate
    from .quantize import quantize
    from .sample import sample
    from .sensitivity import sensitivity
    from .serve import serve
    from .tune import tune
    from .verify import verify

__all__ = ["dequantize", "evaluate", "quantize", "sample", "sensitivity", "serve", "tune", "verify"]


def __getattr__(name: str) -> Any:
    # evaluate needs Paddle and serve a web framework, which the others do not.
    if name in __all__:
        return getattr(importlib.import_module(f".{name}", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
