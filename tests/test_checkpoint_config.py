# SPDX-License-Identifier: Apache-2.0
"""config.json is read strictly: every wrong field is refused by name."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.synthetic import random_weights, tiny_config
from paddle_ccq.errors import CcqError
from paddle_ccq.families.ernie45 import ErnieConfig
from paddle_ccq.families.registry import read_config


def config(**overrides) -> ErnieConfig:
    return read_config(tiny_config(**overrides))


def without(*keys, **overrides) -> dict:
    values = tiny_config(**overrides)
    return {key: value for key, value in values.items() if key not in keys}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"moe_num_experts": 0},
        {"moe_num_shared_experts": 0, "tie_word_embeddings": False},
        {"moe_num_shared_experts": 2, "moe_layer_interval": 2, "num_hidden_layers": 5},
        {"moe_layer_start_index": 0, "moe_layer_end_index": 1},
        {"num_key_value_heads": 1, "num_attention_heads": 8, "head_dim": 16},
    ],
)
def test_canonical_shapes_are_those_of_the_weights(overrides):
    shapes = config(**overrides).tensors.shapes
    expected = {n: w.shape for n, w in random_weights(tiny_config(**overrides)).items()}
    assert shapes == expected
    assert list(shapes) == list(expected)


def test_published_shapes_of_the_largest_model():
    values = tiny_config(
        vocab_size=103424,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=54,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        moe_num_experts=64,
        moe_k=8,
        moe_intermediate_size=3584,
        moe_num_shared_experts=0,
        moe_layer_start_index=3,
        tie_word_embeddings=False,
    )
    model = read_config(values)
    shapes = model.tensors.shapes
    assert model.dense_layers() == [0, 1, 2]
    assert model.moe_layers() == list(range(3, 54))
    assert shapes["ernie.layers.0.self_attn.qkv_proj.weight"] == (8192, 10240)
    assert shapes["ernie.layers.2.mlp.up_gate_proj.weight"] == (8192, 57344)
    assert shapes["ernie.layers.53.mlp.experts.63.up_gate_proj.weight"] == (8192, 7168)
    assert shapes["ernie.layers.53.mlp.experts.63.down_proj.weight"] == (3584, 8192)
    assert shapes["lm_head.weight"] == (8192, 103424)


def test_defaults():
    model = read_config(
        without(
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
            "rope_theta",
            "tie_word_embeddings",
            "moe_layer_end_index",
            "max_position_embeddings",
            "hidden_act",
            "model_type",
        )
    )
    assert model.num_key_value_heads == 4
    assert model.head_dim == 32
    assert model.rms_norm_eps == 1e-5
    assert model.rope_theta == 500000.0
    assert model.tie_word_embeddings is True
    assert model.moe_layer_end_index == 2
    assert model.moe_norm_min == 1e-12
    assert model.dtype == "bfloat16"


def test_null_counts_as_absent():
    assert config(head_dim=None, rope_scaling=None, num_key_value_heads=None).head_dim == 32


def test_absent_expert_count_is_a_dense_model():
    model = read_config(without("moe_num_experts", "moe_k", "moe_intermediate_size"))
    assert model.moe_layers() == []


@pytest.mark.parametrize(
    ("interval", "start", "end", "layers"),
    [(1, 1, -1, [1, 2, 3, 4, 5]), (2, 0, -1, [1, 3, 5]), (1, 2, 3, [2, 3]), (1, 0, 99, range(6))],
)
def test_which_layers_are_moe(interval, start, end, layers):
    model = config(
        num_hidden_layers=6,
        moe_layer_interval=interval,
        moe_layer_start_index=start,
        moe_layer_end_index=end,
    )
    assert model.moe_layers() == list(layers)
    assert sorted(model.moe_layers() + model.dense_layers()) == list(range(6))


def test_dtype_under_either_key():
    assert config(dtype="float16").dtype == "float16"
    assert config(torch_dtype="float32").dtype == "float32"
    assert config(torch_dtype="float32", dtype="float32").dtype == "float32"


def test_rope_theta_one_level_down():
    values = without("rope_theta", rope_parameters={"rope_theta": 1e4, "rope_type": "default"})
    assert read_config(values).rope_theta == 1e4


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "'LlamaForCausalLM' is not.*Ernie4_5_MoeFor"),
        ({"architectures": None}, "architectures.*Ernie4_5_ForCausalLM, Ernie4_5ForCausalLM"),
        ({"architectures": "Ernie4_5_MoeForCausalLM"}, "architectures: not a list"),
        ({"use_bias": True}, "use_bias: true; models with bias"),
        ({"use_bias": 1}, "use_bias: 1 is neither"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: type 'yarn'"),
        ({"rope_scaling": 2}, "rope_scaling: 2 is not an object"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: type 'linear'"),
        ({"moe_num_experts": [64, 64]}, "moe_num_experts: a list.*vision-language"),
        ({"moe_intermediate_size": [1536, 512]}, "moe_intermediate_size: a list"),
        ({"moe_num_experts": -1}, "moe_num_experts: -1"),
        ({"moe_num_experts": 10**9}, "moe_num_experts: 1000000000"),
        ({"moe_k": 5}, "moe_k: 5 is not an integer from 1 to 4"),
        ({"moe_k": None}, "moe_k: missing"),
        ({"moe_layer_interval": 0}, "moe_layer_interval: 0"),
        ({"moe_layer_start_index": -1}, "moe_layer_start_index: -1"),
        ({"moe_layer_end_index": -2}, "moe_layer_end_index: -2"),
        ({"moe_norm_min": 0}, "moe_norm_min: 0"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"hidden_size": "128"}, "hidden_size: '128' is not an integer"),
        ({"hidden_size": 128.0}, "hidden_size: 128.0 is not an integer"),
        ({"hidden_size": True}, "hidden_size: True is not an integer"),
        ({"vocab_size": 0}, "vocab_size: 0"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: 1000000000000"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide 4"),
        ({"num_key_value_heads": 8}, "num_key_value_heads: 8 is not"),
        ({"head_dim": 31}, "head_dim: 31 is odd"),
        ({"head_dim": None, "num_attention_heads": 6}, "head_dim: absent"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps: -1e-05"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: nan"),
        ({"rope_theta": float("inf")}, "rope_theta: inf"),
        ({"rope_theta": "big"}, "rope_theta: 'big'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: 'yes'"),
        ({"dtype": "int8"}, "dtype: 'int8' is not one of bfloat16"),
        ({"torch_dtype": ["bfloat16"]}, "torch_dtype: "),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "but torch_dtype says float16"),
        ({"model_type": 4}, "model_type: 4"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers: -1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings: 0"),
        ({"hidden_size": "x" * 1000}, r"hidden_size: 'x+\.\.\. is not"),
    ],
)
def test_wrong_field_is_named(tmp_path, overrides, problem):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config(**overrides)))
    with pytest.raises(CcqError, match=problem) as error:
        read_config(tmp_path)
    assert str(error.value).startswith(f"{path}: ")


def test_files_that_are_no_config(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(CcqError, match=r"config.json: no such file"):
        read_config(tmp_path)
    for text, problem in [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"a": 1, "a": 2}', "not valid JSON: 'a' occurs twice"),
        ('{"vocab_size": 1' + "0" * 5000 + "}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(CcqError, match=f"config.json: {problem}"):
            read_config(path)
    path.write_bytes(b" " * ((16 << 20) + 1))
    with pytest.raises(CcqError, match="larger than"):
        read_config(path)


odd_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(sorted([*tiny_config(), "dtype", "rope_parameters"])), value=odd_values)
def test_any_value_is_read_or_refused(key, value):
    try:
        model = config(**{key: value})
    except CcqError:
        return
    assert model.num_hidden_layers == len(model.moe_layers() + model.dense_layers())
