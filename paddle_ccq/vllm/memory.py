# SPDX-License-Identifier: Apache-2.0
"""How vLLM will share out a card's memory, worked out from a checkpoint's plan.

vLLM fills `gpu_memory_utilization` of a card: weights, the peak of one step with
`max_num_batched_tokens` tokens, CUDA graphs, and all that remains is KV cache. The sizes of weights
and cache are exact; the others are estimates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checkpoint.plan import Plan
from ..families.tensor import Role

GIB = 1 << 30
BLOCK_TOKENS = 16
# CUDA context, captured graphs, cuBLAS workspaces; measured on one H200 with the 300B's shape.
LIBRARY_BYTES = 3 * GIB
# Tokens that one call of the expert block takes (torch_ops.MOE_TOKENS) and decoded weights at once.
MOE_TOKENS = 4096
DECODED_BYTES = 128 << 20


@dataclass(frozen=True)
class CardMemory:
    """One card's memory, in bytes."""

    total: int
    utilization: float
    weights: int
    step: int
    libraries: int
    token_cache: int  # KV cache of one token

    @property
    def usable(self) -> int:
        return int(self.total * self.utilization)

    @property
    def cache(self) -> int:
        """What is left for the KV cache; negative if not even the rest fits."""
        return self.usable - self.weights - self.step - self.libraries

    @property
    def tokens(self) -> int:
        """Tokens of all sequences together that the cache holds, in whole blocks."""
        return max(0, self.cache // (self.token_cache * BLOCK_TOKENS)) * BLOCK_TOKENS


def _weights(plan: Plan, wish: Any) -> int:
    """Of the fullest card: every matrix in the share that it has there."""
    parallel, config = wish.parallel, plan.config
    stages = [0] * parallel.pipeline
    per_stage = -(-config.num_hidden_layers // parallel.pipeline)
    for item in plan.items:
        size = item.rank_bytes
        expert = item.tensor.is_expert and parallel.experts
        if plan.tensor_parallel_size == 1 and (expert or item.cut):
            size = -(-size // parallel.tensor)
        if item.layer is None:
            stages[0 if item.tensor.role is Role.EMBEDDING else -1] += size
        else:
            stages[min(item.layer // per_stage, parallel.pipeline - 1)] += size
    return max(stages)


def _step(plan: Plan, wish: Any) -> int:
    """Peak of one step: the expert block of its largest call beside the layer's own tensors."""
    config, tokens = plan.config, wish.max_num_batched_tokens
    ranks, hidden = wish.parallel.tensor, config.hidden_size
    width = config.moe_intermediate_size // (1 if wish.parallel.experts else ranks)
    rows = min(tokens, MOE_TOKENS) * config.moe_k
    # Rows in and out, gate and up, their product, and the product's own workspace of the same size.
    experts = 2 * rows * (2 * hidden + 3 * width + hidden) if config.moe_layers() else 0
    dense = 2 * tokens * 3 * config.intermediate_size // ranks if config.dense_layers() else 0
    beside = 2 * tokens * (4 * hidden + (config.q_size + 2 * config.kv_size) // ranks)
    logits = 3 * 4 * wish.max_num_seqs * config.vocab_size
    return max(experts, dense + DECODED_BYTES) + beside + logits


def card_memory(plan: Plan, wish: Any) -> CardMemory:
    """The shares of the fullest card; `wish` is check.Wish."""
    config, ranks = plan.config, wish.parallel.tensor
    layers = -(-config.num_hidden_layers // wish.parallel.pipeline)
    heads = max(1, config.num_key_value_heads // ranks)
    return CardMemory(
        total=wish.card_bytes,
        utilization=wish.gpu_memory_utilization,
        weights=_weights(plan, wish),
        step=_step(plan, wish),
        libraries=LIBRARY_BYTES,
        token_cache=2 * wish.cache_bytes * heads * config.head_dim * layers,
    )
