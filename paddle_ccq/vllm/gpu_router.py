# SPDX-License-Identifier: Apache-2.0
"""Routers' float32 products on Hopper and later, from bfloat16 activations on the tensor cores.

A step of 32 tokens spent 12 us a layer on cuBLAS's float32 product and the sum of its parts, a
prompt of 8192 tokens 0.4 ms a layer on it and on making activations float32 (docs/notes/vllm.md).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from .memory import ROUTER_MULTIPLES

CAPABILITY = (9, 0)


def parts_of(weight: torch.Tensor) -> torch.Tensor:
    """A float32 weight [experts, k] as bfloat16 [3, experts, k] whose sum it is."""
    left, parts = weight.to(torch.float32), []
    for _ in range(3):
        parts.append(left.to(torch.bfloat16))
        left = left - parts[-1].to(torch.float32)
    return torch.stack(parts)


class RouterMethod(UnquantizedLinearMethod):
    """Scores of experts from bfloat16 activations, which the caller has made float32."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        layer.register_buffer("ccq_parts", parts_of(layer.weight.data), persistent=False)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        from .torch_ops import router

        scores = router(x.to(torch.bfloat16), layer.ccq_parts, layer.weight)
        return scores if bias is None else scores + bias


def install(model: torch.nn.Module, dtype: torch.dtype) -> int:
    """Give every router that this product fits its method; how many."""
    found = 0
    if dtype != torch.bfloat16 or torch.cuda.get_device_capability() < CAPABILITY:
        return found
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if not hasattr(module, "e_score_correction_bias") or not hasattr(module, "quant_method"):
            continue
        if not isinstance(module.quant_method, UnquantizedLinearMethod) or weight.ndim != 2:
            continue
        experts, k = weight.shape
        fits = experts % ROUTER_MULTIPLES[0] == 0 and k % ROUTER_MULTIPLES[1] == 0
        if weight.dtype == torch.float32 and fits:
            module.quant_method = RouterMethod()
            found += 1
    return found
