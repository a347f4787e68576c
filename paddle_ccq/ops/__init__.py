# SPDX-License-Identifier: Apache-2.0
"""Operators on packed weights: dequantization, linear layers and the mixture-of-experts block.

Each is imported when first asked for, because all of them need the compiled core and other modules
of this package, such as gpu_library.py, do not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dequantization import dequant
    from .matmul import linear, moe, moe_ffn, moe_gemm
    from .packed import PackedExperts, PackedMatrix, repack, repack_experts

__all__ = [
    "PackedExperts",
    "PackedMatrix",
    "dequant",
    "linear",
    "moe",
    "moe_ffn",
    "moe_gemm",
    "repack",
    "repack_experts",
]

# No module may be called like one of the names: importing it would put it in the name's place.
_MODULES = {
    "dequantization": ("dequant",),
    "matmul": ("linear", "moe", "moe_ffn", "moe_gemm"),
    "packed": ("PackedExperts", "PackedMatrix", "repack", "repack_experts"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __package__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
