# SPDX-License-Identifier: Apache-2.0
"""vLLM's classes that serve checkpoints in Hugging Face's naming, and their registration.

They are registered once such a checkpoint is claimed, so that all other models are served as
without this package; at once where vLLM has a class of a model, but not under its own name, for it
looks at a model's class before it looks at how its weights are stored.
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
# Releases before 0.31 have Qwen3.5's class of text alone as a part of the one that reads images,
# and only that one answers what vLLM asks of a model whose layers have a state.
WHOLE_MODELS = {"Qwen3_5MoeForCausalLM": "Qwen3_5MoeForConditionalGeneration"}
STATE_NAMES = (
    "is_hybrid",
    "get_mamba_state_dtype_from_config",
    "get_mamba_state_shape_from_config",
    "get_mamba_state_copy_func",
)
_MODULE = "paddle_ccq.vllm.model"
_registered: set[str] = set()


def register() -> None:
    """Register the classes that load packed experts; called in each process, more than once too."""
    from vllm.model_executor.models import ModelRegistry

    for architecture in PACKED_MODELS:
        if architecture not in _registered:
            _registered.add(architecture)
            ModelRegistry.register_model(architecture, f"{_MODULE}:{PREFIX}{architecture}")


def register_unknown() -> list[str]:
    """Register the classes whose names this vLLM does not know; returns these names."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    missing = [name for name in WHOLE_MODELS if name not in ModelRegistry.get_supported_archs()]
    for architecture in missing:
        _registered.add(architecture)
        ModelRegistry.register_model(architecture, f"{_MODULE}:{PREFIX}{architecture}")
        # What the model's config.json says of its states' type.
        settings = MODELS_CONFIG_MAP.get(WHOLE_MODELS[architecture])
        if settings is not None:
            MODELS_CONFIG_MAP.setdefault(architecture, settings)
    return missing
