# SPDX-License-Identifier: Apache-2.0
"""Operators on packed weights: dequantization, linear layers and the mixture-of-experts block."""

from .dequant import dequant
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
