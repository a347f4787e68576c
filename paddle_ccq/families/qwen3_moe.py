# SPDX-License-Identifier: Apache-2.0
"""Qwen3-MoE (30B-A3B, 235B-A22B, Coder): every layer sparse, no shared expert, norms of heads.

Names and shapes are those of the published checkpoints and of transformers' Qwen3Moe classes.
"""

from __future__ import annotations

from collections.abc import Iterator

from .common import Layout, make_family
from .moe_config import Keys, MoeConfig
from .parts import Part, grouped_query, layer_norms, norm, router, swiglu
from .tensor import Role


def sparse(config: MoeConfig) -> Iterator[int]:
    """As transformers' class: every decoder_sparse_step-th layer but those in mlp_only_layers."""
    step = max(config.sizes["decoder_sparse_step"], 1)
    dense = config.layers_in("mlp_only_layers")
    for layer in range(config.num_hidden_layers):
        if layer not in dense and (layer + 1) % step == 0:
            yield layer


def layer(config: MoeConfig, number: int) -> Iterator[Part]:
    """All tensors of a layer but its routed experts; there is no shared expert."""
    yield from layer_norms(config)
    yield from grouped_query(config, bias=config.flag("attention_bias"))
    yield norm("self_attn.q_norm", config.head_dim)
    yield norm("self_attn.k_norm", config.head_dim)
    if config.is_moe_layer(number):
        yield router(config)
    else:
        yield from swiglu("mlp", config.hidden_size, config.intermediate_size, Role.MLP)


FAMILY = make_family(
    "Qwen3-MoE",
    ["Qwen3MoeForCausalLM"],
    Layout(layer, sparse),
    keys=Keys(sizes={"decoder_sparse_step": 1}),
)
