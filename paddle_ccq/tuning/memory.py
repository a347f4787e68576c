# SPDX-License-Identifier: Apache-2.0
"""How much memory tuning needs, checked before the system ends the process for lack of it."""

from __future__ import annotations

import math

from ..checkpoint.reader import Checkpoint
from ..errors import CcqError
from ..families.ernie45 import ErnieConfig
from ..families.tensor import Role
from ..host import available_memory
from ..units import gigabytes
from .settings import TuningSettings

# A tensor that is tuned whole: its value and the best one so far in float64, Adam's two means and
# the batch's sum of gradients in float32; and a window's gradient for each window of the batch.
WHOLE_BYTES = 28
# Experts have only their column scales tuned, embedding and head nothing.
NOT_TUNED = frozenset({Role.EXPERT, Role.EMBEDDING, Role.HEAD})
# Float32 activations, in hidden sizes, that the backward pass needs for one token and layer:
# residual stream, norms, projections and their sums.
ACTIVATIONS = 10


def needed_bytes(checkpoint: Checkpoint, settings: TuningSettings, threads: int) -> int:
    """An estimate for the whole run; the model's float32 weights are most of it."""
    config = checkpoint.config
    weights = whole = 0
    for name in checkpoint.model_names():
        size = math.prod(checkpoint.shape(name))
        weights += size
        if config.tensors[name].role not in NOT_TUNED:
            whole += size
    states = 2 * 4 * settings.tokens * config.hidden_size
    backward = threads * settings.window * _token_bytes(config, settings.window)
    return 4 * weights + (WHOLE_BYTES + 4 * settings.batch) * whole + states + backward


def _token_bytes(config: ErnieConfig, window: int) -> int:
    """Bytes that one token's backward pass needs of all layers.

    Beside the activations of hidden size these are attention's probabilities and the MLP's.
    """
    inner = config.intermediate_size
    if config.moe_num_experts:
        routed = config.moe_k * (3 * config.moe_intermediate_size + 3 * config.hidden_size)
        shared = 3 * config.moe_num_shared_experts * config.moe_intermediate_size
        inner = max(inner, routed + shared)
    layer = ACTIVATIONS * config.hidden_size + inner + config.num_attention_heads * window // 2
    return 4 * (config.num_hidden_layers * layer + 4 * config.vocab_size)


def check_memory(checkpoint: Checkpoint, settings: TuningSettings, threads: int) -> None:
    """Refuse a model that this machine cannot hold.

    Raises:
        CcqError: with what is needed and what there is.
    """
    needed, available = needed_bytes(checkpoint, settings, threads), available_memory()
    if available is not None and needed > available:
        raise CcqError(
            f"{checkpoint.path}: tuning holds the whole model as float32 and needs about"
            f" {gigabytes(needed)} of memory, but {gigabytes(available)} are free; use a larger"
            " machine"
        )
