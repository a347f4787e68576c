# SPDX-License-Identifier: Apache-2.0
"""How FastDeploy will divide a card's memory, computed from config.json alone.

FastDeploy fills `gpu_memory_utilization` of a card: weights, what the libraries hold, the peak of
one profiling step with `max_num_batched_tokens` tokens, and all that remains is KV cache
(worker/gpu_worker.py, determine_available_memory). The sizes of weights and cache are exact;
activations and libraries are estimates.
"""

from __future__ import annotations

from ..checkpoint.plan import Plan
from ..checkpoint.planned import PlannedTensor
from ..codec import trellis
from ..codec.wint2 import ROWS_PER_BYTE
from ..engine_check import GIB, CardMemory
from ..families.ernie45 import ErnieConfig
from ..ops.gpu_abi import trellis_bytes

BLOCK_TOKENS = 64  # FastDeploy's default block_size
DEFAULT_BATCHED_TOKENS = 8192  # FastDeploy's default with chunked prefill
DEFAULT_UTILIZATION = 0.9
# CUDA context, kernels and cuBLAS workspaces; collectives with more than one card. Assumed.
LIBRARY_BYTES = 3 * GIB // 2
COLLECTIVE_BYTES = GIB
# Sampling holds the logits, their probabilities, a sorted copy and its indices.
LOGIT_COPIES = 4
CACHE_BYTES = 2  # bfloat16
ACTIVATION_BYTES = 2


def cache_bytes_per_token(config: ErnieConfig, ranks: int) -> int:
    """KV cache of one token on one card: keys and values of its share of the key heads."""
    heads = max(1, config.num_key_value_heads // ranks)
    return 2 * CACHE_BYTES * heads * config.head_dim * config.num_hidden_layers


def loaded_bytes(planned: PlannedTensor) -> int:
    """Bytes of a rank's tensor on its card, in the layout that the kernels read."""
    if planned.format != trellis.NAME:
        return planned.rank_bytes
    # Units repeat the byte before each of their blocks (trellis_repack.h).
    (rows, columns), *_ = (s for name, _, s in planned.specs if name.endswith(".quant_weight"))
    return sum(trellis_bytes(rows * ROWS_PER_BYTE, columns))


def weight_bytes(plan: Plan) -> int:
    """Weights on one card; a tied output head is a second copy there (ernie4_5_moe.py)."""
    config = plan.config
    # Layers for multi-token prediction are loaded for speculative decoding alone.
    used = (planned for planned in plan.tensors if not config.is_prediction(planned.tensor))
    stored = sum(loaded_bytes(planned) for planned in used)
    if not config.tie_word_embeddings:
        return stored
    return stored + 2 * config.vocab_size * config.hidden_size // plan.tensor_parallel_size


def activation_bytes(config: ErnieConfig, ranks: int, tokens: int, sequences: int) -> int:
    """Peak of one step with `tokens` tokens: the widest MLP beside the attention's tensors."""
    hidden = config.hidden_size
    inner = config.moe_intermediate_size // ranks
    # Per token and chosen expert: input, gate and up, their product, output.
    widest = config.moe_k * (2 * hidden + 3 * inner) if config.moe_layers() else 0
    widths = [config.shared_intermediate_size] if config.moe_layers() else []
    if config.dense_layers():
        widths.append(config.intermediate_size)
    for width in widths:
        widest = max(widest, hidden + 3 * width // ranks)
    # Residual, normalized input, attention output, projection; queries, keys and values.
    beside = 4 * hidden + (config.q_size + 2 * config.kv_size) // ranks
    logits = LOGIT_COPIES * 4 * sequences * config.vocab_size
    return ACTIVATION_BYTES * tokens * (widest + beside) + logits


def card_memory(
    plan: Plan,
    total: int,
    sequences: int,
    batched_tokens: int = DEFAULT_BATCHED_TOKENS,
    utilization: float = DEFAULT_UTILIZATION,
) -> CardMemory:
    """The memory of each of the plan's cards."""
    ranks = plan.tensor_parallel_size
    return CardMemory(
        total=total,
        utilization=utilization,
        weights=weight_bytes(plan),
        activations=activation_bytes(plan.config, ranks, batched_tokens, sequences),
        libraries=LIBRARY_BYTES + (COLLECTIVE_BYTES if ranks > 1 else 0),
        token_cache=cache_bytes_per_token(plan.config, ranks),
        block_tokens=BLOCK_TOKENS,
    )
