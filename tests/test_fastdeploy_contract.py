# SPDX-License-Identifier: Apache-2.0
"""Every name, shape, dtype and config key that FastDeploy's loader asks for, spelled out here."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.codec import formats, row_order
from paddle_ccq.codec.formats import EXPERT_FORMATS
from paddle_ccq.families.registry import read_config
from paddle_ccq.quantize import quantize
from paddle_ccq.targets.fastdeploy.config import (
    config_problems,
    output_config,
    quantization_config,
)
from paddle_ccq.targets.fastdeploy.layout import build_plan

H, INNER, E, VOCAB = 128, 128, 4, 320
NQ, NKV, D, DENSE_I, SHARED_I = 4, 2, 32, 256, 128
BF16 = np.dtype(ml_dtypes.bfloat16)


def contract(layers: int, moe_start: int, wint4_end: int, tied: bool) -> dict:
    """name -> (dtype, shape) of a WINT2 checkpoint, written down from FastDeploy's side."""
    expected = {
        "ernie.embed_tokens.weight": ("BF16", [VOCAB, H]),
        "ernie.norm.weight": ("BF16", [H]),
    }
    if not tied:
        expected["lm_head.weight"] = ("BF16", [H, VOCAB])

    def wint8(prefix: str, k: int, n: int) -> None:
        expected[f"{prefix}.quant_weight"] = ("I8", [n, k])
        expected[f"{prefix}.weight_scale"] = ("BF16", [n])

    for layer in range(layers):
        p = f"ernie.layers.{layer}"
        expected[f"{p}.input_layernorm.weight"] = ("BF16", [H])
        expected[f"{p}.post_attention_layernorm.weight"] = ("BF16", [H])
        wint8(f"{p}.self_attn.qkv_proj", H, (NQ + 2 * NKV) * D)
        wint8(f"{p}.self_attn.o_proj", NQ * D, H)
        if layer < moe_start:
            wint8(f"{p}.mlp.up_gate_proj", H, 2 * DENSE_I)
            wint8(f"{p}.mlp.down_proj", DENSE_I, H)
            continue
        expected[f"{p}.mlp.gate.weight"] = ("F32", [H, E])
        expected[f"{p}.mlp.moe_statics.e_score_correction_bias"] = ("F32", [1, E])
        wint8(f"{p}.mlp.shared_experts.up_gate_proj", H, 2 * SHARED_I)
        wint8(f"{p}.mlp.shared_experts.down_proj", SHARED_I, H)
        for expert in range(E):
            for projection, k, n in (("up_gate_proj", H, 2 * INNER), ("down_proj", INNER, H)):
                q = f"{p}.mlp.experts.{expert}.{projection}"
                if layer <= wint4_end:
                    expected[f"{q}.quant_weight"] = ("I8", [n // 2, k])
                    expected[f"{q}.weight_scale"] = ("BF16", [n])
                    continue
                expected[f"{q}.quant_weight"] = ("U8", [k // 4, n])
                expected[f"{q}.weight_scale"] = ("U8", [k // 128, n])
                expected[f"{q}.super_scales"] = ("BF16", [n])
                expected[f"{q}.code_scale"] = ("F32", [n])
                expected[f"{q}.code_zp"] = ("F32", [n])
    return expected


def stored(folder) -> dict:
    found = {}
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in sorted(set(index.values())):
        with safe_open(folder / shard, framework="np") as file:
            assert file.metadata() == {"format": "np"}
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), part.get_shape())
                assert index[name] == shard
    assert sorted(found) == sorted(index)
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "ernie-tiny"
    config = tiny_config(tie_word_embeddings=False)
    write_checkpoint(folder, {**config, "transformers_version": "4.57.1", "auto_map": {"a": "b.c"}})
    return folder


def test_names_shapes_and_dtypes(source, tmp_path):
    quantize(source, tmp_path / "out", wint4_end_layer=1, preset="fast", quiet=True)
    assert stored(tmp_path / "out") == contract(3, moe_start=1, wint4_end=1, tied=False)


def test_paddle_layout_gives_the_same_checkpoint(source, tmp_path):
    twin = tmp_path / "ernie-tiny"
    write_checkpoint(twin, tiny_config(tie_word_embeddings=False), layout="paddle", shards=3)
    quantize(source, tmp_path / "a", preset="fast", quiet=True)
    quantize(twin, tmp_path / "b", preset="fast", quiet=True)
    for path in sorted((tmp_path / "a").glob("*.safetensors*")):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_config_json(source, tmp_path):
    quantize(source, tmp_path / "out", wint4_end_layer=1, preset="fast", quiet=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert not {"torch_dtype", "transformers_version", "auto_map"} & config.keys()
    assert config["architectures"] == ["Ernie4_5_MoeForCausalLM"]
    assert config["quantization_config"] == {
        "dense_quant_type": "wint8",
        "moe_quant_type": "w4w2",
        "quantization": "wint2",
        "moe_quant_config": {
            "quant_type": "w4w2",
            "moe_w4_quant_config": {
                "quant_type": "wint4",
                "quant_granularity": "per_channel",
                "quant_start_layer": 0,
                "quant_end_layer": 1,
            },
            "moe_w2_quant_config": {
                "quant_type": "wint2",
                "quant_granularity": "pp_acc",
                "quant_group_size": 64,
                "quant_start_layer": 2,
                "quant_end_layer": 2,
            },
        },
    }
    assert config["paddle_ccq"]["row_order"] == "fastdeploy-2.1"
    assert config["paddle_ccq"]["source_model"] == "ernie-tiny"
    assert config_problems(config) == []


def test_defaults_that_fastdeploy_would_take_otherwise_are_spelled_out():
    raw = tiny_config()
    for key in ("rope_theta", "head_dim", "tie_word_embeddings", "moe_use_aux_free"):
        del raw[key]
    raw |= {"moe_layer_start_index": None, "rope_parameters": {"rope_theta": 10_000.0}}
    config = read_config(raw)
    written = output_config(build_plan(config), {})
    assert written["rope_theta"] == 10_000.0
    assert written["head_dim"] == 32
    assert written["tie_word_embeddings"] is True
    assert written["moe_use_aux_free"] is True
    assert written["moe_layer_start_index"] == 1


def test_the_published_300b_recipe(tmp_path):
    raw = tiny_config(num_hidden_layers=54, moe_layer_start_index=3)
    config = read_config(raw)
    quantization = quantization_config(build_plan(config))["moe_quant_config"]
    assert quantization["moe_w4_quant_config"]["quant_end_layer"] == 6
    assert quantization["moe_w2_quant_config"]["quant_start_layer"] == 7
    assert quantization["moe_w2_quant_config"]["quant_end_layer"] == 53


def test_dense_model(tmp_path):
    write_checkpoint(tmp_path / "m", tiny_config(moe_num_experts=0))
    result = quantize(tmp_path / "m", tmp_path / "out", quiet=True)
    assert any("no MoE layer" in message for message in result.plan.messages)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {"dense_quant_type": "wint8", "quantization": "wint8"}
    assert config["architectures"] == ["Ernie4_5_ForCausalLM"]


def test_rows_are_permuted_for_2_1_and_plain_for_2_0(source, tmp_path):
    name = "ernie.layers.1.mlp.experts.0.down_proj"
    decoded = {}
    for layout in ("2.1", "2.0"):
        out = tmp_path / layout
        quantize(source, out, fastdeploy_layout=layout, preset="fast", quiet=True)
        with safe_open(out / "model-00001-of-00001.safetensors", framework="np") as file:
            tensors = {
                suffix: file.get_tensor(f"{name}.{suffix}")
                for suffix in formats.tensor_specs("wint2", INNER, H)
            }
        decoded[layout] = formats.decode("wint2", tensors, "bfloat16")
        recorded = json.loads((out / "config.json").read_text())["paddle_ccq"]["row_order"]
        assert recorded == {"2.1": "fastdeploy-2.1", "2.0": "plain"}[layout]
    with safe_open(source / "model.safetensors", framework="np") as file:
        float_name = name.replace("ernie.", "model.") + ".weight"
        weight = file.get_tensor(float_name).astype(np.float32).T
    # Stored row 16a + 2b + c holds input row 8b + 2a + c.
    order = [8 * b + 2 * a + c for a in range(4) for b in range(8) for c in range(2)]
    permuted = weight.reshape(-1, 64, H)[:, order].reshape(-1, H)

    def error(x, y):
        return float(((x - y) ** 2).sum() / (y**2).sum())

    assert error(decoded["2.0"], weight) < 0.15
    assert error(decoded["2.1"], permuted) < 0.15
    assert error(decoded["2.1"], weight) > 0.5
    np.testing.assert_array_equal(row_order.permute_rows(weight), permuted)


@pytest.mark.parametrize("format", ["ccq-2t", "ccq-2.5", "ccq-2.75"])
def test_own_formats_are_named_so_that_fastdeploy_refuses_them(source, tmp_path, format):
    quantize(source, tmp_path / "out", format=format, preset="fast", quiet=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quantization"] == format
    assert config["paddle_ccq"]["row_order"] == "plain"
    found = stored(tmp_path / "out")
    suffixes = {n.rpartition(".")[2] for n in found if ".experts.0." in n}
    # WINT2's names without its code pairs, which a reader of WINT2 would miss at once.
    scales = {"weight_scale"} if format == "ccq-2t" else set()
    assert suffixes == {"quant_weight", "super_scales"} | scales


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"torch_dtype": "bfloat16"}, "torch_dtype beside dtype"),
        ({"dtype": None}, "dtype is missing"),
        ({"transformers_version": "4.56.1"}, "transformers_version 4.56.1"),
        ({"transformers_version": "5.0"}, "transformers_version 5.0"),
        ({"architectures": ["Ernie4_5_ForCausalLM"]}, "architectures must be"),
        ({"quantization_config": {}}, "quantization_config.quantization is missing"),
    ],
)
def test_config_problems(change, text):
    config = read_config(tiny_config())
    good = output_config(build_plan(config), {})
    assert config_problems(good) == []
    assert config_problems({**good, "transformers_version": "4.56.0"}) == []
    assert any(text in problem for problem in config_problems({**good, **change}))


@pytest.mark.parametrize("format", EXPERT_FORMATS)
def test_config_problems_of_every_format(format):
    good = output_config(build_plan(read_config(tiny_config()), format=format), {})
    assert config_problems(good) == []
    dense = {**good, "architectures": ["Ernie4_5_ForCausalLM"]}
    assert any(
        f"must be ['Ernie4_5_MoeForCausalLM'] for {format}" in p for p in config_problems(dense)
    )
    good["quantization_config"]["moe_quant_config"]["moe_w2_quant_config"]["quant_type"] = "wint4"
    (problem,) = config_problems(good)
    assert f"quant_type is 'wint4', but quantization says '{format}'" in problem
