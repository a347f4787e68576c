# SPDX-License-Identifier: Apache-2.0
"""MiniMax-M2: every layer sparse, experts w1, w2 and w3, norms of queries over all heads.

Names and shapes are those of the published checkpoints and of transformers' MiniMaxM2 classes,
which save the router and the stacked experts under `mlp` in their own layout.
"""

from __future__ import annotations

from collections.abc import Iterator

from .common import Layout, make_family
from .moe_config import LOCAL_FIRST, Keys, MoeConfig
from .parts import Part, correction_bias, grouped_query, layer_norms, norm, router

BLOCK, BIAS = "block_sparse_moe", "e_score_correction_bias"


def sparse(config: MoeConfig) -> range:
    """Every layer; config.json has no key that could say otherwise."""
    return range(config.num_hidden_layers)


def layer(config: MoeConfig, _: int) -> Iterator[Part]:
    """All tensors of a layer but its routed experts; there is no shared expert."""
    yield from layer_norms(config)
    yield from grouped_query(config)
    if config.flag("use_qk_norm", True):
        yield norm("self_attn.q_norm", config.num_attention_heads * config.head_dim)
        yield norm("self_attn.k_norm", config.num_key_value_heads * config.head_dim)
    yield router(config, f"{BLOCK}.gate", alias="mlp.gate.weight")
    yield correction_bias(config, f"{BLOCK}.{BIAS}", alias=f"mlp.{BIAS}")


FAMILY = make_family(
    "MiniMax-M2",
    ["MiniMaxM2ForCausalLM"],
    Layout(layer, sparse, experts=f"{BLOCK}.experts", projections=("w1", "w3", "w2")),
    # The experts' width; there is no dense layer. Its layers for prediction are not published.
    keys=Keys(experts=LOCAL_FIRST, width=("intermediate_size",)),
)
