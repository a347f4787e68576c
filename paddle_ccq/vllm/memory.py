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
from ..checkpoint.safetensors_format import tensor_bytes
from ..engine_check import GIB, CardMemory
from ..families.tensor import Role
from .expert_sizes import rank_bytes

BLOCK_TOKENS = 16
# CUDA context, captured graphs, cuBLAS workspaces; measured on one H200 with the 300B's shape.
LIBRARY_BYTES = 3 * GIB
# Tokens that one call of the expert block takes, for its workspace grows by the row, 0.4 MB a token
# of the 300B. A prompt of 8192 took 1.44 s in halves, 1.39 s whole (docs/notes/vllm.md).
MOE_TOKENS = 8192
DECODED_BYTES = 128 << 20  # of a dense layer's weights at a time, for many rows
# From so many tokens in a step on, wint4 experts are decoded one by one (docs/notes/vllm.md).
W4_DECODED_TOKENS = 768
# The router's product takes multiples of so many experts and inputs (custom_ops/gpu/moe/router.h),
# and has, beside each float32 weight, three bfloat16 parts of it (gpu_router.py).
ROUTER_MULTIPLES, ROUTER_PARTS_BYTES = (16, 64), 3 * 2

# The pipeline stages that hold a tensor outside the layers.
FIRST, LAST, EVERY = slice(1), slice(-1, None), slice(None)


def stage_numbers(layers: int, stages: int) -> list[int]:
    """The pipeline stage of every layer, as vLLM shares them out (distributed/utils.py).

    What is left over of an even share goes to the stages before the last, from behind.
    """
    sizes = [layers // stages] * stages
    for i in range(layers % stages):
        sizes[-2 - i] += 1
    return [stage for stage, size in enumerate(sizes) for _ in range(size)]


def fullest_stage(
    plan: Plan,
    serve: Any,
    bytes_of: Callable[[PlannedTensor], int],
    holders: Callable[[PlannedTensor], slice],
) -> int:
    """Bytes of weights on a card of the fullest pipeline stage.

    Args:
        bytes_of: what the first card of a stage holds of a tensor.
        holders: of a tensor outside the layers, the stages that hold it: FIRST, LAST or EVERY.
    """
    parallel, config = serve.parallel, plan.config
    stages = [0] * parallel.pipeline
    numbers = stage_numbers(config.num_hidden_layers, parallel.pipeline)
    for planned in plan.tensors:
        if config.is_prediction(planned.tensor):
            continue  # not loaded
        size = bytes_of(planned)
        if planned.layer is not None:
            stages[numbers[planned.layer]] += size
            continue
        for stage in range(parallel.pipeline)[holders(planned)]:
            stages[stage] += size
    return max(stages)


def decoded_expert(plan: Plan, serve: Any) -> int:
    """Bytes of the one expert's up_gate that is decoded to bfloat16 at a time, if any is wint4."""
    config, parallel = plan.config, serve.parallel
    if not plan.wint4_layers or serve.max_num_batched_tokens < W4_DECODED_TOKENS:
        return 0
    width = config.moe_intermediate_size // (1 if parallel.experts else parallel.tensor)
    return 2 * config.hidden_size * 2 * width


def _has_router_parts(planned: PlannedTensor) -> bool:
    inputs, experts = planned.shape
    return not (experts % ROUTER_MULTIPLES[0] or inputs % ROUTER_MULTIPLES[1])


def _weights(plan: Plan, serve: Any) -> int:
    """Of the fullest card: every matrix in the share and in the layout that it has there."""
    config, ranks = plan.config, serve.parallel.tensor
    whole = config.moe_num_experts if serve.parallel.experts else 0

    def bytes_of(planned: PlannedTensor) -> int:
        tensor, shape = planned.tensor, planned.shape
        if tensor.is_expert:
            return rank_bytes(planned, ranks, whole)
        if tensor.role is Role.ROUTER:
            parts = planned.format == "f32" and _has_router_parts(planned)
            return planned.rank_bytes + parts * ROUTER_PARTS_BYTES * planned.weights
        if tensor.cut is None or ranks == 1:
            return planned.rank_bytes
        # A key head that several ranks share is on each of them.
        width = sum(max(part // ranks, tensor.cut.unit) for part in tensor.cut.parts)
        shape = tuple(width if i == tensor.cut.axis else n for i, n in enumerate(shape))
        stored = plan.target.stored(tensor, planned.format, shape)
        return sum(tensor_bytes(dtype, dims) for _, dtype, dims in stored)

    def holders(planned: PlannedTensor) -> slice:
        return FIRST if planned.tensor.role is Role.EMBEDDING else LAST

    return fullest_stage(plan, serve, bytes_of, holders)


def _activations(plan: Plan, serve: Any) -> int:
    """Peak of one step: the expert block of its largest call beside the layer's own tensors."""
    config, tokens = plan.config, serve.max_num_batched_tokens
    ranks, hidden = serve.parallel.tensor, config.hidden_size
    width = config.moe_intermediate_size // (1 if serve.parallel.experts else ranks)
    rows = min(tokens, MOE_TOKENS) * config.moe_k
    # Rows in and out, gate and up, their product, and the product's own workspace of the same size.
    experts = 2 * rows * (2 * hidden + 3 * width + hidden) if config.moe_layers() else 0
    experts += decoded_expert(plan, serve)
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
