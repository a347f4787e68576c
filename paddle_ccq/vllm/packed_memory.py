# SPDX-License-Identifier: Apache-2.0
"""A card's memory for checkpoints in Hugging Face's layout, of all families that vLLM serves."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..checkpoint.plan import Plan
from ..checkpoint.planned import PlannedTensor
from ..engine_check import CardMemory
from ..families.qwen3_5_moe import FAMILY as QWEN3_5_MOE
from ..families.qwen3_moe import FAMILY as QWEN3_MOE
from ..families.tensor import DENSE_ROLES, Role
from .expert_sizes import rank_bytes
from .memory import (
    BLOCK_TOKENS,
    DECODED_BYTES,
    EVERY,
    FIRST,
    LAST,
    LIBRARY_BYTES,
    MOE_TOKENS,
    decoded_expert,
    fullest_stage,
    stage_numbers,
)

_CUT_ROLES = DENSE_ROLES | {Role.EMBEDDING, Role.HEAD}
# Latent attention's first matrices, which vLLM holds whole on every card.
_WHOLE = ("q_a_proj", "kv_a_proj_with_mqa")


def is_shared(planned: PlannedTensor) -> bool:
    """Whether cards share a tensor beside the experts; those that vLLM may not cut are whole."""
    tensor = planned.tensor
    return tensor.role in _CUT_ROLES and tensor.stem.rpartition(".")[2] not in _WHOLE


def attention_layers(plan: Plan, stages: int) -> int:
    """The most layers with a KV cache on a pipeline stage; those of linear attention have none."""
    config = plan.config
    numbers = stage_numbers(config.num_hidden_layers, stages)
    found = {t.layer for t in config.tensors.values() if ".self_attn." in t.name}
    counts = Counter(numbers[n] for n in found if n is not None and n < len(numbers))
    return max(counts.values(), default=0)


def _weights(plan: Plan, serve: Any) -> int:
    """Of the fullest card."""
    config, ranks = plan.config, serve.parallel.tensor
    whole = config.moe_num_experts if serve.parallel.experts else 0

    def bytes_of(planned: PlannedTensor) -> int:
        if planned.tensor.is_expert:
            return rank_bytes(planned, ranks, whole)
        if not is_shared(planned):
            return planned.rank_bytes
        keys = planned.tensor.stem.rpartition(".")[2] in ("k_proj", "v_proj")
        heads = config.num_key_value_heads if keys else ranks
        return -(-planned.rank_bytes // min(ranks, heads))

    def holders(planned: PlannedTensor) -> slice:
        role, family = planned.tensor.role, config.family
        # vLLM's classes of these models build both ends or one of them whatever the stage.
        if role is Role.EMBEDDING and family in (QWEN3_MOE, QWEN3_5_MOE):
            return EVERY
        if role is Role.HEAD:
            return EVERY if family is QWEN3_MOE else LAST
        return FIRST

    return fullest_stage(plan, serve, bytes_of, holders)


def _activations(plan: Plan, serve: Any) -> int:
    """Peak of one step: the expert block of its largest call beside the layer's own tensors."""
    config: Any = plan.config
    tokens, ranks, hidden = serve.max_num_batched_tokens, serve.parallel.tensor, config.hidden_size
    width = config.moe_intermediate_size // (1 if serve.parallel.experts else ranks)
    rows = min(tokens, MOE_TOKENS) * config.moe_k
    experts = 2 * rows * (2 * hidden + 3 * width + hidden) + decoded_expert(plan, serve)
    dense = 2 * tokens * 3 * config.intermediate_size // ranks
    sizes = getattr(config, "sizes", {})
    head = config.head_dim
    if "kv_lora_rank" in sizes:
        head = sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"]
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    beside = 2 * tokens * (4 * hidden + heads * head // ranks)
    logits = 3 * 4 * serve.max_num_seqs * config.vocab_size
    return max(experts, dense + DECODED_BYTES) + beside + logits


def _token_cache(plan: Plan, serve: Any) -> int:
    """Bytes of one token in the fullest card's KV cache."""
    config: Any = plan.config
    layers = attention_layers(plan, serve.parallel.pipeline)
    sizes = getattr(config, "sizes", {})
    if "kv_lora_rank" in sizes:  # one latent vector for all heads, on every card
        return serve.cache_bytes * (sizes["kv_lora_rank"] + sizes["qk_rope_head_dim"]) * layers
    heads = max(1, config.num_key_value_heads // serve.parallel.tensor)
    return 2 * serve.cache_bytes * heads * config.head_dim * layers


def card_memory(plan: Plan, serve: Any) -> CardMemory:
    """The memory of the fullest card; `serve` is a check.ServeConfig.

    Weights are exact on one card; on several, what vLLM may hold whole counts as whole.
    """
    return CardMemory(
        total=serve.card_bytes,
        utilization=serve.gpu_memory_utilization,
        weights=_weights(plan, serve),
        activations=_activations(plan, serve),
        libraries=LIBRARY_BYTES,
        token_cache=_token_cache(plan, serve),
        block_tokens=BLOCK_TOKENS,
    )
