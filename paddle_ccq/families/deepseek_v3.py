# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V3, R1 and V3.1: latent attention, a shared expert, a layer for prediction.

Names and shapes are those of the published checkpoints and of transformers' DeepseekV3 classes.
The layers for multi-token prediction follow on the others: model.layers.61 of the 671B.
"""

from __future__ import annotations

from collections.abc import Iterator

from .common import Layout, make_family
from .moe_config import ROUTED_FIRST, Keys, MoeConfig
from .parts import Part, correction_bias, layer_norms, linear, norm, prediction_head, router, swiglu
from .tensor import Role

KEYS = Keys(
    experts=ROUTED_FIRST,
    sizes={
        "kv_lora_rank": None,
        "qk_nope_head_dim": None,
        "qk_rope_head_dim": None,
        "v_head_dim": None,
        # 0 or null: queries are one matrix.
        "q_lora_rank": 0,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "n_shared_experts": 0,
    },
)


def latent_attention(config: MoeConfig) -> Iterator[Part]:
    """Queries, keys and values through matrices of low rank."""
    sizes, hidden, heads = config.sizes, config.hidden_size, config.num_attention_heads
    rank, rope, value = sizes["kv_lora_rank"], sizes["qk_rope_head_dim"], sizes["v_head_dim"]
    queries = heads * (sizes["qk_nope_head_dim"] + rope)
    if sizes["q_lora_rank"]:
        yield linear("self_attn.q_a_proj", sizes["q_lora_rank"], hidden)
        yield norm("self_attn.q_a_layernorm", sizes["q_lora_rank"])
        yield linear("self_attn.q_b_proj", queries, sizes["q_lora_rank"])
    else:
        yield linear("self_attn.q_proj", queries, hidden)
    yield linear("self_attn.kv_a_proj_with_mqa", rank + rope, hidden)
    yield norm("self_attn.kv_a_layernorm", rank)
    yield linear("self_attn.kv_b_proj", heads * (sizes["qk_nope_head_dim"] + value), rank)
    yield linear("self_attn.o_proj", hidden, heads * value)


def sparse(config: MoeConfig) -> Iterator[int]:
    """Each layer from first_k_dense_replace on whose number moe_layer_freq divides."""
    step = max(config.sizes["moe_layer_freq"], 1)
    for layer in range(config.sizes["first_k_dense_replace"], config.num_hidden_layers):
        if layer % step == 0:
            yield layer


def layer(config: MoeConfig, number: int) -> Iterator[Part]:
    """All tensors of a layer but its routed experts.

    The correction bias is there where topk_method is noaux_tc, or absent.
    """
    hidden, width = config.hidden_size, config.moe_intermediate_size
    yield from layer_norms(config)
    yield from latent_attention(config)
    if not config.is_moe_layer(number):
        yield from swiglu("mlp", hidden, config.intermediate_size, Role.MLP)
        return
    yield router(config)
    if config.values.get("topk_method", "noaux_tc") == "noaux_tc":
        yield correction_bias(config, "mlp.gate.e_score_correction_bias")
    shared = config.sizes["n_shared_experts"] * width
    if shared:
        yield from swiglu("mlp.shared_experts", hidden, shared, Role.SHARED_EXPERT)
    if number in config.prediction_layers:
        yield from prediction_head(config)


FAMILY = make_family("DeepSeek-V3", ["DeepseekV3ForCausalLM"], Layout(layer, sparse), keys=KEYS)
