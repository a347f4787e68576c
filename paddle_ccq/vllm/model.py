# SPDX-License-Identifier: Apache-2.0
"""vLLM's ERNIE-4.5 classes, which also load the checkpoints that this package writes."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.ernie45 import Ernie4_5ForCausalLM
from vllm.model_executor.models.ernie45_moe import Ernie4_5_MoeForCausalLM
from vllm.platforms import current_platform

from . import cpu_router, loading
from .config import CcqConfig


class _Loads:
    """load_weights that knows packed checkpoints; for all others nothing changes."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        found = vllm_config.quant_config
        self.ccq = found if isinstance(found, CcqConfig) else None
        if self.ccq is not None:
            self.ccq.check_parallel(vllm_config.parallel_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.ccq is not None and current_platform.is_cpu():
            cpu_router.correct(self)

    def load_weights(self, weights: loading.Weights) -> set[str]:
        if self.ccq is None:
            return super().load_weights(weights)
        return loading.load(self, self.ccq, weights, super().load_weights)


class CcqErnieMoeForCausalLM(_Loads, Ernie4_5_MoeForCausalLM):
    """ERNIE-4.5 with experts."""


class CcqErnieForCausalLM(_Loads, Ernie4_5ForCausalLM):
    """ERNIE-4.5 without experts."""


__all__ = ["CcqErnieForCausalLM", "CcqErnieMoeForCausalLM"]
