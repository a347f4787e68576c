# SPDX-License-Identifier: Apache-2.0
"""Families whose names or shapes are not those that transformers' own classes save."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase

import pytest

from helpers.family_models import CASES, Case, stored_shapes
from paddle_ccq.families.registry import read_config
from paddle_ccq.families.tensor import Role

# Read in the published checkpoint's headers: name -> shape.
DEEPSEEK_671B = {
    "model.layers.61.self_attn.q_a_proj.weight": (1536, 7168),
    "model.layers.0.self_attn.q_b_proj.weight": (24576, 1536),
    "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
    "model.layers.60.self_attn.kv_b_proj.weight": (32768, 512),
    "model.layers.60.self_attn.o_proj.weight": (7168, 16384),
    "model.layers.2.mlp.gate_proj.weight": (18432, 7168),
    "model.layers.2.mlp.down_proj.weight": (7168, 18432),
    "model.layers.3.mlp.gate.weight": (256, 7168),
    "model.layers.3.mlp.gate.e_score_correction_bias": (256,),
    "model.layers.3.mlp.experts.255.up_proj.weight": (2048, 7168),
    "model.layers.61.mlp.experts.0.down_proj.weight": (7168, 2048),
    "model.layers.3.mlp.shared_experts.gate_proj.weight": (2048, 7168),
    "model.layers.61.eh_proj.weight": (7168, 14336),
    "model.layers.61.shared_head.head.weight": (129280, 7168),
    "model.embed_tokens.weight": (129280, 7168),
    "lm_head.weight": (129280, 7168),
}
DEEPSEEK_CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "intermediate_size": 18432,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "vocab_size": 129280,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
}


def named_shapes(config) -> dict[str, tuple[int, ...]]:
    """What the family's file says lies on disk."""
    return {
        part.name: part.shape
        for tensor in config.tensors.values()
        for part in tensor.sources["pt"].parts
    }


def test_deepseeks_published_shapes():
    config = read_config(DEEPSEEK_CONFIG)
    shapes = named_shapes(config)
    assert {name: shapes[name] for name in DEEPSEEK_671B} == DEEPSEEK_671B
    assert config.moe_layers() == list(range(3, 62))
    experts = sum(
        math.prod(t.shape)
        for t in config.tensors.values()
        if t.role is Role.EXPERT and t.layer < 61
    )
    assert experts == 58 * 256 * 3 * 2048 * 7168
    assert not any(name.startswith("model.layers.2.mlp.experts") for name in shapes)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_names_and_shapes_are_those_of_transformers(case: Case):
    pytest.importorskip("transformers")
    config, shapes = stored_shapes(case)
    model = read_config(config)
    assert model.family.name == case.family
    expected = {
        part.name: part.shape
        for tensor in model.tensors.values()
        if not model.is_prediction(tensor)
        for part in tensor.sources["pt"].parts
    }
    assert expected == shapes


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_stacked_experts_are_where_transformers_puts_them(case: Case):
    pytest.importorskip("transformers")
    config, shapes = stored_shapes(case, stacked=True)
    found = {}
    model = read_config(config)
    for tensor in model.tensors.values():
        if model.is_prediction(tensor):
            continue
        for part in tensor.sources["pt"].parts:
            if part.stacked is not None:
                found[part.stacked.name] = part.stacked.shape
            else:
                found[part.aliases[0] if part.aliases else part.name] = part.shape
    assert found == shapes


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_place_is_taken_twice(case: Case):
    tensors = read_config(case.config).tensors
    places = {(t.role, t.layer, t.expert, t.projection) for t in tensors.values()}
    assert len(places) == len(tensors)
    for tensor in tensors.values():
        named = tensor.template.format(layer=tensor.layer, expert=tensor.expert)
        assert fnmatchcase(tensor.name, named)
        assert tensor.layer is None or named == tensor.name
