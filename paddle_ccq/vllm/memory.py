# SPDX-License-Identifier: Apache-2.0
"""How vLLM will share out a card's memory, worked out from a checkpoint's plan.

vLLM fills `gpu_memory_utilization` of a card: weights, the peak of one step with
`max_num_batched_tokens` tokens, CUDA graphs, and all that remains is KV cache. The sizes of weights
and cache are exact; the others are estimates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..checkpoint.plan import Plan
from ..checkpoint.planned import PlannedTensor
from ..engine_check import GIB, CardMemory, loaded_bytes
from ..families.tensor import Role

BLOCK_TOKENS = 16
# CUDA context, captured graphs, cuBLAS workspaces; measured on one H200 with the 300B's shape.
LIBRARY_BYTES = 3 * GIB
# Tokens that one call of the expert block takes, for its workspace grows by the row, 0.4 MB a token
# of the 300B. A prompt of 8192 took 1.44 s in halves, 1.39 s whole (docs/notes/vllm.md).
MOE_TOKENS = 8192
DECODED_BYTES = 128 << 20  # of a dense layer's weights at a time, for many rows


def fullest_stage(
    plan: Plan,
    serve: Any,
    is_shared: Callable[[PlannedTensor], bool],
    is_first: Callable[[PlannedTensor], bool],
) -> int:
    """Bytes of weights on a card of the fullest pipeline stage.

    Args:
        is_shared: whether the cards of a stage hold a share of a matrix each, not all of it.
        is_first: of a tensor outside the layers, whether it is the first stage's; else the last's.
    """
    parallel, config = serve.parallel, plan.config
    stages = [0] * parallel.pipeline
    per_stage = -(-config.num_hidden_layers // parallel.pipeline)
    for planned in plan.tensors:
        if config.is_prediction(planned.tensor):
            continue  # not loaded
        size = loaded_bytes(planned)
        if is_shared(planned):
            size = -(-size // parallel.tensor)
        if planned.layer is None:
            stages[0 if is_first(planned) else -1] += size
        else:
            stages[min(planned.layer // per_stage, parallel.pipeline - 1)] += size
    return max(stages)


def _weights(plan: Plan, serve: Any) -> int:
    """Of the fullest card: every matrix in the share that it has there."""

    def is_shared(planned: PlannedTensor) -> bool:
        expert = planned.tensor.is_expert and serve.parallel.experts
        return plan.tensor_parallel_size == 1 and bool(expert or planned.cut)

    return fullest_stage(plan, serve, is_shared, lambda p: p.tensor.role is Role.EMBEDDING)


def _activations(plan: Plan, serve: Any) -> int:
    """Peak of one step: the expert block of its largest call beside the layer's own tensors."""
    config, tokens = plan.config, serve.max_num_batched_tokens
    ranks, hidden = serve.parallel.tensor, config.hidden_size
    width = config.moe_intermediate_size // (1 if serve.parallel.experts else ranks)
    rows = min(tokens, MOE_TOKENS) * config.moe_k
    # Rows in and out, gate and up, their product, and the product's own workspace of the same size.
    experts = 2 * rows * (2 * hidden + 3 * width + hidden) if config.moe_layers() else 0
    dense = 2 * tokens * 3 * config.intermediate_size // ranks if config.dense_layers() else 0
    beside = 2 * tokens * (4 * hidden + (config.q_size + 2 * config.kv_size) // ranks)
    logits = 3 * 4 * serve.max_num_seqs * config.vocab_size
    return max(experts, dense + DECODED_BYTES) + beside + logits


def card_memory(plan: Plan, serve: Any) -> CardMemory:
    """The memory of the fullest card; `serve` is a check.ServeConfig."""
    config, ranks = plan.config, serve.parallel.tensor
    layers = -(-config.num_hidden_layers // serve.parallel.pipeline)
    heads = max(1, config.num_key_value_heads // ranks)
    return CardMemory(
        total=serve.card_bytes,
        utilization=serve.gpu_memory_utilization,
        weights=_weights(plan, serve),
        activations=_activations(plan, serve),
        libraries=LIBRARY_BYTES,
        token_cache=2 * serve.cache_bytes * heads * config.head_dim * layers,
        block_tokens=BLOCK_TOKENS,
    )
