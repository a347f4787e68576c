# SPDX-License-Identifier: Apache-2.0
"""Sizes of experts that this package's kernels take in vLLM."""

from __future__ import annotations

from ..families.config import ModelConfig

# Of hidden size and of an expert's width on a card.
KERNEL_MULTIPLE = 128


def unfit_for_vllm(config: ModelConfig, ranks: int = 1) -> list[str]:
    """What of a model's experts our kernels in vLLM can't take, as notes to the user.

    Args:
        ranks: folders that they are cut into.
    """
    if not config.moe_num_experts:
        return []
    width = config.moe_intermediate_size // ranks
    sizes = {"hidden size": config.hidden_size, "width of experts": width}
    return [
        f"{what} {size}: our kernels in vLLM need a multiple of {KERNEL_MULTIPLE}"
        for what, size in sizes.items()
        if size % KERNEL_MULTIPLE
    ]
