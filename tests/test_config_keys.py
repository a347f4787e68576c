# SPDX-License-Identifier: Apache-2.0
"""Keys of config.json: two names of one value agree, and what changes the model is checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.dequantize import dequantize
from paddle_ccq.errors import CcqError
from paddle_ccq.families.ernie45 import ErnieConfig
from paddle_ccq.families.ernie45.config_keys import ALIASES, FIXED, FIXED_MOE, NEUTRAL, READ
from paddle_ccq.families.registry import read_config
from paddle_ccq.quantize import main as quantize_main
from paddle_ccq.quantize import quantize

CONFIGS = Path(__file__).parent.parent / "examples" / "configs"
ERNIE_TEXT_EXAMPLES = ("ernie-4.5-21b-a3b", "ernie-4.5-300b-a47b")


def read(**changes) -> ErnieConfig:
    """The tiny config with changes; `...` removes a key."""
    values = tiny_config(**{k: v for k, v in changes.items() if v is not ...})
    return read_config({k: v for k, v in values.items() if changes.get(k, 0) is not ...})


def refusal(**changes) -> str:
    with pytest.raises(CcqError) as caught:
        read(**changes)
    message = str(caught.value)
    assert message.startswith("config.json: ") and "\n" not in message
    return message


# --- published configs --------------------------------------------------------------------------

DENSE = {
    "architectures": ["Ernie4_5_ForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 131072,
    "model_type": "ernie4_5",
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_hidden_layers": 18,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "use_cache": False,
    "vocab_size": 103424,
    "rope_theta": 500000,
    "use_bias": False,
    "tie_word_embeddings": True,
}
AUTO_MAP = {"auto_map": {"AutoConfig": "configuration_ernie4_5.Ernie4_5_Config"}}
# What PaddlePaddle's configs of the family hold beside these (ERNIEKit, PaddleFormers, FastDeploy).
TRAINING = {
    "add_tail_layers": False,
    "attention_probs_dropout_prob": 0.0,
    "compression_ratio": 1.0,
    "fuse_gate_detach_matmul": True,
    "fuse_linear": False,
    "fuse_ln": False,
    "fuse_rms_norm": True,
    "fuse_rope": True,
    "fuse_swiglu": True,
    "global_aux_loss": False,
    "hidden_dropout_prob": 0.0,
    "initializer_range": 0.02,
    "max_sequence_length": 4096,
    "model_name": "ernie",
    "paddlenlp_version": None,
    "use_fast_ln": True,
    "use_flash_attention": True,
    "use_rmsnorm": True,
    "weight_share_add_bias": True,
}
MOE = {
    "moe_aux_loss_lambda": 0.01,
    "moe_capacity": [64, 64, 64],
    "moe_gate": "topk",
    "moe_gate_act": "softmax",
    "moe_group_orthogonal_loss": True,
    "moe_layer_interval": 1,
    "moe_norm_gate_logits": True,
    "moe_norm_min": 1e-12,
    "moe_orthogonal_loss_lambda": 0.01,
    "moe_use_aux_free": True,
    "moe_z_loss_lambda": 0.0001,
    "num_nextn_predict_layers": 1,
    "multi_token_pred_lambda": 0.3,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
}


def example(name: str) -> dict:
    return json.loads((CONFIGS / name / "config.json").read_text())


@pytest.mark.parametrize(
    "values",
    [
        {**DENSE, **AUTO_MAP, "torch_dtype": "bfloat16"},
        {**DENSE, "dtype": "bfloat16", **TRAINING},
        # As transformers 5 writes it.
        {
            **{key: value for key, value in DENSE.items() if key != "rope_theta"},
            "architectures": ["Ernie4_5ForCausalLM"],
            "dtype": "bfloat16",
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
            "transformers_version": "5.0.0",
        },
        *({**example(name), **TRAINING, **MOE, **AUTO_MAP} for name in ERNIE_TEXT_EXAMPLES),
        # The 300B in 2 bits.
        {**example("ernie-4.5-300b-a47b"), "quantization_config": {"quantization": "wint2"}},
    ],
    ids=["0.3B-PT", "0.3B-Paddle", "0.3B transformers", *ERNIE_TEXT_EXAMPLES, "300B 2Bits"],
)
def test_published_configs_are_read_without_a_warning(values):
    assert read_config(values).notes == ()


# --- one value under two names ------------------------------------------------------------------

PAIRS = [(name, other) for name, others in ALIASES.items() for other in others]


@pytest.mark.parametrize(("name", "other"), PAIRS)
@pytest.mark.parametrize("nested", [False, True])
def test_two_names_of_one_value(name, other, nested):
    value = tiny_config()[name]
    wrong = (not value) if isinstance(value, bool) else "gelu" if name == "hidden_act" else 999
    changes = {"text_config": {other: wrong}} if nested else {other: wrong}
    message = refusal(**changes)
    label = f"text_config.{other}" if nested else other
    for part in (name, label, str(wrong).lower() if isinstance(wrong, bool) else str(wrong)):
        assert part in message
    same = {"text_config": {other: value}} if nested else {other: value}
    assert read(**same) == read()
    # Alone, it is the value; an output has it under the name that every loader reads.
    alone = read(**{name: ...}, **same)
    assert alone == read() and alone.raw[name] == value
    assert other not in alone.raw and "text_config" not in alone.raw


def test_a_nested_text_config_repeats_or_completes_the_top():
    nested = tiny_config()
    assert read(text_config=nested) == read()
    assert read(hidden_size=..., text_config=nested) == read()
    message = refusal(text_config={**nested, "moe_k": 1})
    assert "moe_k: 2, but text_config.moe_k says 1" in message
    assert "not an object" in refusal(text_config=3)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"rope_parameters": {"rope_theta": 1e4}}, ("rope_theta: 500000.0", "10000.0")),
        ({"rope_scaling": {"rope_theta": 1e4}}, ("rope_theta", "rope_scaling.rope_theta")),
        (
            {"rope_theta": ..., "rope_scaling": {"rope_theta": 1e4},
             "rope_parameters": {"rope_theta": 2e4}},
            ("rope_scaling.rope_theta: 10000.0", "rope_parameters.rope_theta says 20000.0"),
        ),
        ({"rope_parameters": {"rope_theta": "x"}}, ("rope_parameters.rope_theta: 'x'",)),
        ({"rotary_dim": 16}, ("rotary_dim: 16", "head_dim says 32")),
        ({"use_moe": False}, ("use_moe: false", "moe_num_experts says 4")),
        ({"use_moe": True, "moe_num_experts": 0}, ("use_moe: true", "moe_num_experts says 0")),
        ({"model_type": "ernie4_5"}, ("model_type: 'ernie4_5'", "moe_num_experts says 4")),
        (
            {"architectures": ["Ernie4_5_ForCausalLM"]},
            ("architectures: 'Ernie4_5_ForCausalLM'", "moe_num_experts says 4"),
        ),
        ({"model_type": "llama"}, ("model_type: 'llama'", "ernie4_5_moe")),
        ({"shared_expert_intermediate_size": 256}, ("256", "says 128")),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, ("dtype: float16", "bfloat16")),
    ],
)  # fmt: skip
def test_other_contradictions(changes, parts):
    message = refusal(**changes)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_special_tokens_of_generation_config(tmp_path, key):
    write_checkpoint(tmp_path / "m", tiny_config(**{key: 7}))
    with pytest.raises(CcqError, match=rf"generation_config.json: {key}: \d, but .* says 7"):
        open_checkpoint(tmp_path / "m")
    assert quantize_main(["--model", str(tmp_path / "m"), "--dry-run"]) == 2


def test_more_end_tokens_in_one_of_the_files_are_no_contradiction(tmp_path):
    write_checkpoint(tmp_path / "m", tiny_config(eos_token_id=[2, 7]))
    assert open_checkpoint(tmp_path / "m").config.raw["eos_token_id"] == [2, 7]


# --- keys that change what is computed ----------------------------------------------------------

BAD_VALUES = ("gelu", 7, True, False, [3], {"a": 1})


@pytest.mark.parametrize("key", [*FIXED, *FIXED_MOE])
def test_keys_that_change_the_model_have_its_value(key):
    allowed = {**FIXED, **FIXED_MOE}[key]
    for value in allowed:
        assert read(**{key: value}).notes == ()
    bad = [value for value in BAD_VALUES if value not in allowed]
    assert bad
    for value in bad:
        assert key in refusal(**{key: value})
    assert read(**{key: None}).notes == ()


@pytest.mark.parametrize("key", FIXED_MOE)
def test_router_keys_mean_nothing_in_a_dense_model(key):
    assert read(moe_num_experts=0, **{key: "odd"}).notes == ()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"moe_gate_act": "sigmoid"}, "moe_gate_act: 'sigmoid' is not supported, only 'softmax'"),
        ({"scoring_func": "sigmoid"}, "scoring_func: 'sigmoid'"),
        ({"norm_topk_prob": False}, "norm_topk_prob: false is not supported, only true"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor: 2.5"),
        ({"moe_use_aux_free": False}, "moe_use_aux_free: false"),
        ({"n_group": 8}, "n_group: 8"),
        ({"use_qk_norm": True}, "use_qk_norm: true"),
        ({"sliding_window": 4096}, "sliding_window: 4096"),
        ({"sliding_window": 4096, "use_sliding_window": True}, "use_sliding_window: true"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"] * 7}, "layer_types: has 7 entries, but num_hidden_la"),
        ({"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types: has 2 entries"),
        ({"mlp_layer_types": ["sparse"] * 3}, "'sparse' for layer 0, which is 'dense'"),
        ({"mlp_layer_types": ["dense", "sparse", "moe"]}, "'moe' for layer 2, which is 'sparse'"),
        ({"mlp_layer_types": "dense"}, "mlp_layer_types: 'dense' is not a list"),
        ({"router_activation": "sigmoid"}, "router_activation: 'sigmoid'"),
        ({"moe_norm_topk": False}, "moe_norm_topk: false"),
        ({"use_rms_norm": False}, "use_rms_norm: false"),
        ({"num_dense_layers": 2}, "num_dense_layers says 2"),
        ({"quantization_config": "int4"}, "quantization_config: 'int4' is not an object"),
        ({"quantization_config": [8]}, "quantization_config: [8] is not an object"),
        ({"attention_bias": True}, "attention_bias: true"),
        ({"rope_is_neox_style": True}, "rope_is_neox_style: true"),
        ({"vision_config": {"depth": 32}}, "vision_config: "),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq'"),
        ({"compression_config": {"format": "x"}}, "compression_config"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: type 'linear'"),
        ({"rope_scaling": {"rope_type": "default", "type": "yarn"}}, "type 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters: type 'llama3'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "type 'dynamic'"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling.factor: 8.0 is not supported, only 1"),
        ({"rope_scaling": {"mrope_section": [22, 22, 20]}}, "rope_scaling.mrope_section"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters.full_attention",
        ),
    ],
)
def test_forms_that_cannot_be_honoured_are_named(changes, text):
    assert text in refusal(**changes)


def test_lists_that_agree_with_the_other_keys():
    for kinds in ({"layer_types": ["full_attention"] * 3}, {"layer_types": []}):
        assert read(**kinds).notes == ()
    assert read(mlp_layer_types=["dense", "sparse", "sparse"]).notes == ()
    assert read(moe_num_experts=0, mlp_layer_types=["dense"] * 3).notes == ()


def test_an_empty_quantization_config_is_none_to_a_dry_run_too(tmp_path):
    write_checkpoint(tmp_path / "m", tiny_config(quantization_config={}))
    for flags in (["--dry-run"], ["--output", str(tmp_path / "out"), "--preset", "fast"]):
        assert quantize_main(["--model", str(tmp_path / "m"), *flags]) == 0


def test_a_window_that_is_not_used():
    assert read(sliding_window=4096, use_sliding_window=False).notes == ()


def test_unknown_keys_are_a_warning(tmp_path, capsys):
    (note,) = read(new_router_trick=3, empty=None).notes
    assert "unknown keys" in note and "new_router_trick (3)" in note and "empty" not in note
    write_checkpoint(tmp_path / "m", tiny_config(**{"a[b]": "[red]x[/]"}))
    assert any("a[b]" in message for message in open_checkpoint(tmp_path / "m").messages)
    assert quantize_main(["--model", str(tmp_path / "m"), "--dry-run"]) == 0
    assert "a[b] ('[red]x[/]')" in capsys.readouterr().out


def test_values_that_are_taken_for_granted_are_said():
    notes = read(rope_theta=..., rms_norm_eps=...).notes
    assert notes == (
        "config.json has no rope_theta: taken as 500000",
        "config.json has no rms_norm_eps: taken as 1e-05",
    )
    assert read(rope_theta=..., rope_parameters={"rope_theta": 1e4}).notes == ()


def test_every_key_is_of_one_kind():
    kinds = [set(ALIASES), set(FIXED), set(FIXED_MOE), set(READ), set(NEUTRAL)]
    kinds.append({other for others in ALIASES.values() for other in others})
    kinds[0] -= {"hidden_act"}  # read under other names, and fixed
    assert sum(map(len, kinds)) == len(set().union(*kinds))


# --- outputs ------------------------------------------------------------------------------------


def test_outputs_state_every_value_once_and_plainly(tmp_path):
    config = tiny_config(num_experts=4, moe_topk=2, rope_parameters={"rope_theta": 1e4})
    write_checkpoint(tmp_path / "m", tiny_config())
    path = tmp_path / "m" / "config.json"
    gone = ("moe_num_experts", "moe_k", "rope_theta", "rms_norm_eps", "moe_num_shared_experts")
    write_with = {k: v for k, v in config.items() if k not in gone}
    path.write_text(json.dumps({**write_with, "num_shared_experts": 1, "torch_dtype": "bfloat16"}))
    quantize(tmp_path / "m", tmp_path / "out", quiet=True, preset="fast")
    for folder in (tmp_path / "out", dequantize(tmp_path / "m", tmp_path / "pt", "pt")):
        written = json.loads((folder / "config.json").read_text())
        assert written["moe_num_experts"] == 4 and written["moe_k"] == 2
        assert written["rope_theta"] == 1e4 and written["rms_norm_eps"] == 1e-5
        assert written["moe_num_shared_experts"] == 1
        assert not {"num_experts", "moe_topk", "num_shared_experts"} & set(written)
        assert open_checkpoint(folder).config == open_checkpoint(tmp_path / "m").config


def test_a_dense_output_is_no_moe_model_to_any_loader(tmp_path):
    config = tiny_config(moe_num_experts=0) | {
        "model_type": "ernie4_5_moe",
        "architectures": ["Ernie4_5_MoeForCausalLM"],
    }
    write_checkpoint(tmp_path / "m", config)
    written = dequantize(tmp_path / "m", tmp_path / "pt", "pt")
    stated = json.loads((written / "config.json").read_text())
    assert stated["model_type"] == "ernie4_5"
    assert stated["architectures"] == ["Ernie4_5_ForCausalLM"]


def test_a_dry_run_refuses_a_quantized_config(tmp_path, capsys):
    config = {**tiny_config(), "quantization_config": {"quantization": "wint2"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert quantize_main(["--model", str(tmp_path), "--dry-run"]) == 2
    assert "quantized already" in capsys.readouterr().err
