# SPDX-License-Identifier: Apache-2.0
"""How much memory there is, and the limits that follow from it."""

from __future__ import annotations

import os

from ..families.ernie45 import ErnieConfig
from ..host import available_memory, default_threads, proc_bytes
from .kv_cache import bytes_per_token

# Part of the free memory that the cache may reserve where the operator names no size.
CACHE_SHARE = 0.25
# What a second thread costs in waking it, measured, is the work on this many weight bytes.
THREAD_BYTES = 1 << 20


def resident_bytes(process: int | str = "self") -> int:
    """Memory of a process that is really there; 0 where the system does not tell."""
    return proc_bytes(f"/proc/{process}/status", "VmRSS") or 0


def available_bytes() -> int:
    """Memory that can be had without swapping; 0 where the system does not tell."""
    return available_memory() or 0


def cache_tokens(config: ErnieConfig, max_length: int, max_sequences: int) -> int:
    """Places for every sequence at its longest, if a quarter of the free memory holds them."""
    each = bytes_per_token(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    wanted = max_length * max_sequences
    free = available_bytes()
    if free:
        wanted = min(wanted, int(free * CACHE_SHARE) // each)
    return max(wanted, max_length)


def threads_for(config: ErnieConfig) -> int:
    """Threads of the packed products: one where a token's experts of a layer are small."""
    width = config.moe_intermediate_size if config.moe_num_experts else config.intermediate_size
    packed = 3 * config.hidden_size * width * max(1, config.moe_k) // 4
    return default_threads() if packed >= THREAD_BYTES else 1


API_KEY_VARIABLE = "PADDLE_CCQ_API_KEY"


def api_key(given: str | None) -> str | None:
    """The key of the command line, else of the environment (which `ps` does not show)."""
    return given or os.environ.get(API_KEY_VARIABLE) or None
