# SPDX-License-Identifier: Apache-2.0
"""From tensors in Hugging Face's naming to the layers of any of vLLM's classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..errors import CcqError
from .loading import Weights, check_all_there
from .packed_config import PackedConfig
from .read_ahead import ahead


def place(
    model: torch.nn.Module, packed: PackedConfig, weights: Weights
) -> Iterator[tuple[str, torch.Tensor]]:
    """Put packed tensors where they belong, and hand the others on.

    Raises:
        CcqError: naming a tensor that does not fit, and experts that never came whole.
    """
    modules = dict(model.named_modules())
    for name, tensor in ahead(packed.folder, weights):
        found = packed.claim.parse(name)
        if found is None:
            yield name, tensor
            continue
        layer = _layer(modules, packed.modules[found.module], found.module)
        if layer is not None:
            arguments = (found.expert, found.projection, found.suffix, tensor, name)
            layer.quant_method.place(layer, *arguments)
    check_all_there(modules)


def _layer(modules: dict[str, Any], name: str, disk: str) -> Any:
    """The module of experts; None where this card or model has none of that name."""
    found = [modules.get(candidate) for candidate in (f"{name}.routed_experts", name)]
    if all(module is None for module in found):
        return None
    for module in found:
        if hasattr(getattr(module, "quant_method", None), "place"):
            return module
    raise CcqError(f"{disk}: vLLM's class of this model has no such experts in a packed format")
