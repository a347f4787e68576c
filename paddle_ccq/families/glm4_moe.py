# SPDX-License-Identifier: Apache-2.0
"""GLM-4.5, 4.6, 4.7 and Air: grouped queries with biases, shared expert, a layer for prediction.

Names and shapes are those of the published checkpoints and of transformers' Glm4Moe classes.
"""

from __future__ import annotations

from collections.abc import Iterator

from .common import Layout, make_family
from .moe_config import ROUTED_FIRST, Keys, MoeConfig
from .parts import (
    Part,
    correction_bias,
    grouped_query,
    layer_norms,
    norm,
    prediction_head,
    router,
    swiglu,
)
from .tensor import Role


def sparse(config: MoeConfig) -> range:
    """As transformers' class: every layer from first_k_dense_replace on."""
    return range(config.sizes["first_k_dense_replace"], config.num_hidden_layers)


def layer(config: MoeConfig, number: int) -> Iterator[Part]:
    """All tensors of a layer but its routed experts; norms of heads where use_qk_norm says so."""
    hidden = config.hidden_size
    yield from layer_norms(config)
    yield from grouped_query(config, bias=config.flag("attention_bias"))
    if config.flag("use_qk_norm"):
        yield norm("self_attn.q_norm", config.head_dim)
        yield norm("self_attn.k_norm", config.head_dim)
    if not config.is_moe_layer(number):
        yield from swiglu("mlp", hidden, config.intermediate_size, Role.MLP)
        return
    yield router(config)
    yield correction_bias(config, "mlp.gate.e_score_correction_bias")
    shared = config.sizes["n_shared_experts"] * config.moe_intermediate_size
    if shared:
        yield from swiglu("mlp.shared_experts", hidden, shared, Role.SHARED_EXPERT)
    if number in config.prediction_layers:
        yield from prediction_head(config)


FAMILY = make_family(
    "GLM-4.5",
    ["Glm4MoeForCausalLM"],
    Layout(layer, sparse),
    keys=Keys(experts=ROUTED_FIRST, sizes={"first_k_dense_replace": 0, "n_shared_experts": 0}),
)
