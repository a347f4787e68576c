# SPDX-License-Identifier: Apache-2.0
"""vLLM's classes that serve checkpoints in Hugging Face's naming, and their registration.

They are registered once such a checkpoint is claimed, so that all other models are served as
without this package.
"""

from __future__ import annotations

# vLLM's module of each class, which has the architecture's name.
PACKED_MODELS = {
    "DeepseekV3ForCausalLM": "vllm.model_executor.models.deepseek_v2",
    "Glm4MoeForCausalLM": "vllm.model_executor.models.glm4_moe",
    "MiniMaxM2ForCausalLM": "vllm.model_executor.models.minimax_m2",
    "Qwen3MoeForCausalLM": "vllm.model_executor.models.qwen3_moe",
    "Qwen3_5MoeForCausalLM": "vllm.model_executor.models.qwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "vllm.model_executor.models.qwen3_5",
}
PREFIX = "Ccq"
_MODULE = "paddle_ccq.vllm.model"
_registered: set[str] = set()


def register() -> None:
    """Register the classes that load packed experts; called in each process, more than once too."""
    from vllm.model_executor.models import ModelRegistry

    for architecture in PACKED_MODELS:
        if architecture not in _registered:
            _registered.add(architecture)
            ModelRegistry.register_model(architecture, f"{_MODULE}:{PREFIX}{architecture}")
