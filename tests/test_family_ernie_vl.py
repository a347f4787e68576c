# SPDX-License-Identifier: Apache-2.0
"""ERNIE-4.5-VL: names, two kinds of experts, and logits after quantizing and dequantizing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.family_models import ERNIE_VL, random_model, save, stored_shapes
from helpers.synthetic import write_tensors
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.checkpoint.safetensors_io import TensorFolder
from paddle_ccq.dequantize import dequantize
from paddle_ccq.errors import CcqError
from paddle_ccq.families.registry import read_config
from paddle_ccq.families.tensor import Role
from paddle_ccq.quantize import main, quantize
from paddle_ccq.verify import verify

# As published, but for sizes: text and vision in one object, pairs of numbers.
PUBLISHED = {
    "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
    "model_type": "ernie4_5_moe_vl",
    "vocab_size": 103424,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "moe_num_experts": [64, 64],
    "moe_intermediate_size": [1536, 512],
    "moe_k": 6,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": [1, 1],
    "moe_layer_end_index": [29, 28],
    "moe_layer_interval": 1,
    "tie_word_embeddings": True,
    "vision_config": {"depth": 32, "hidden_size": 1280, "mlp_ratio": 4, "patch_size": 14},
}


def test_the_28b_by_its_published_config():
    config = read_config(PUBLISHED)
    assert config.family.name == "ERNIE-4.5-VL"
    assert config.moe_layers() == list(range(1, 28))
    shapes = {
        part.name: part.shape for t in config.tensors.values() for part in t.sources["pt"].parts
    }
    layer = "model.layers.27.mlp."
    assert shapes[f"{layer}experts.63.gate_proj.weight"] == (1536, 2560)
    assert shapes[f"{layer}experts.64.gate_proj.weight"] == (512, 2560)
    assert shapes[f"{layer}experts.127.down_proj.weight"] == (2560, 512)
    assert f"{layer}experts.128.down_proj.weight" not in shapes
    assert shapes[f"{layer}gate.weight"] == shapes[f"{layer}gate.weight_1"] == (2560, 64)
    assert shapes[f"{layer}moe_statics.e_score_correction_bias"] == (2, 64)
    assert shapes[f"{layer}shared_experts.up_proj.weight"] == (3072, 2560)
    assert shapes["vision_model.blocks.31.mlp.fc1.weight"] == (5120, 1280)
    assert shapes["model.resampler_model.temporal_linear.0.weight"] == (5120, 10240)
    assert "lm_head.weight" not in shapes
    total = sum(np.prod(shape) for shape in shapes.values())
    assert 28e9 < total < 30e9  # "28B"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"moe_num_experts": [64, 32]}, "different numbers of text and vision experts"),
        ({"moe_num_experts": [64, 64, 64]}, "is not one number for text and one for vision"),
        ({"moe_num_experts": None}, "moe_num_experts: missing"),
        ({"moe_intermediate_size": [1536, "512"]}, "'512' is not an integer"),
        ({"moe_intermediate_size": "1536"}, "'1536' is not an integer"),
        ({"moe_layer_start_index": [1, 3]}, "experts of one kind alone"),
        ({"moe_layer_end_index": [27, 20]}, "experts of one kind alone"),
        ({"text_config": 3}, "text_config: 3 is not an object"),
    ],
)
def test_configs_that_are_not_right_are_refused(changes, problem):
    with pytest.raises(CcqError, match=re.escape(problem)):
        read_config({**PUBLISHED, **changes})


def test_one_number_stands_for_both_kinds():
    config = read_config({**PUBLISHED, "moe_num_experts": 64, "moe_layer_end_index": -1})
    assert config.moe_num_experts == 128
    assert config.tensors == read_config(PUBLISHED).tensors


@pytest.mark.parametrize(
    ("name", "problem", "remedy"),
    [
        ("ernie.norm.weight", "Paddle's naming", "-PT"),
        ("model.language_model.norm.weight", "transformers' own form", "save_original_format"),
    ],
)
def test_other_namings_are_refused_by_name(tmp_path, capsys, name, problem, remedy):
    (tmp_path / "model").mkdir()
    write_tensors(tmp_path / "model", {name: np.zeros(2560, np.float32)}, 1)
    (tmp_path / "model" / "config.json").write_text(json.dumps(PUBLISHED))
    for more in ([], ["--dry-run"]):
        arguments = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), *more]
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{name}: this is {problem}" in line
        assert remedy in line
        assert not (tmp_path / "out").exists()


# --- against transformers -------------------------------------------------------------------------


def test_names_and_shapes_are_those_of_transformers():
    pytest.importorskip("transformers")
    config, shapes = stored_shapes(ERNIE_VL)
    expected = {}
    for tensor in read_config(config).tensors.values():
        (part, *more) = tensor.sources["pt"].parts
        for found in (part, *more):
            # transformers puts the vision encoder below `model`.
            expected[found.aliases[0] if found.aliases else found.name] = found.shape
    assert expected == shapes


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Any, Path, Path]:
    """A tiny random model, its source as published, and the quantized folder."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("vl")
    model = random_model(ERNIE_VL)
    save(model, folder / "saved")
    tensors = TensorFolder(folder / "saved")
    stored = {n.replace("model.vision", "vision"): tensors.read(n) for n in tensors.names()}
    (folder / "source").mkdir()
    write_tensors(folder / "source", stored, shards=2)
    config = (folder / "saved" / "config.json").read_text()
    (folder / "source" / "config.json").write_text(config)
    quantize(folder / "source", folder / "output", preset="fast", quiet=True)
    return model, folder / "source", folder / "output"


def read_all(folder: Path) -> dict[str, np.ndarray]:
    tensors = TensorFolder(folder)
    return {name: tensors.read(name) for name in tensors.names()}


def test_all_but_the_experts_is_the_source_byte_for_byte(made):
    _, source, output = made
    before, after = read_all(source), read_all(output)
    kept = {name for name in before if ".experts." not in name}
    assert {name for name in after if ".experts." not in name} == kept
    assert any(name.startswith("vision_model.") for name in kept)
    assert "model.layers.1.mlp.gate.weight_1" in kept
    for name in kept:
        assert after[name].dtype == before[name].dtype
        assert after[name].tobytes() == before[name].tobytes()
    entry = json.loads((output / "config.json").read_text())["quantization_config"]
    assert entry["experts"] == {"model.layers.1.mlp.experts": "wint2"}
    result = verify(output, source)
    assert result.sound, result.problems
    assert len(result.matrices) == 2 * 8


def test_dequantized_the_logits_are_those_of_the_decoded_weights(made, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, _, output = made
    checkpoint = open_checkpoint(output)
    parameters = dict(model.named_parameters())
    tokens = torch.arange(17).reshape(1, 17) * 5 % 90

    def logits(of) -> Any:
        # Some tokens as if they came from an image: both kinds of experts take part.
        kinds = (torch.arange(17).reshape(1, 17) % 3 == 1).int()
        with torch.no_grad():
            return of(input_ids=tokens, moe_mm_token_type_ids=kinds, mm_token_type_ids=kinds * 0)

    before = logits(model).logits.float()
    with torch.no_grad():
        for expert in range(8):
            kind, place = ("text_moe", expert) if expert < 4 else ("vision_moe", expert - 4)
            for projection in ("gate_up_proj", "down_proj"):
                name = f"model.layers.1.mlp.experts.{expert}.{projection}.weight"
                values = torch.from_numpy(checkpoint.read_out_in(name)).to(torch.bfloat16)
                stack = f"model.language_model.layers.1.mlp.{kind}.experts.{projection}"
                assert parameters[stack][place].shape == values.shape
                parameters[stack][place] = values
    expected = logits(model).logits.float()
    assert not torch.equal(expected, before)
    dequantize(output, tmp_path / "float", log=lambda _: None)
    auto = getattr(transformers, ERNIE_VL.auto)
    again, info = auto.from_pretrained(
        tmp_path / "float", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits(again.eval()).logits.float(), expected)


def test_a_missing_vision_expert_is_named(made, tmp_path):
    _, source, _ = made
    tensors = read_all(source)
    del tensors["model.layers.1.mlp.experts.6.up_proj.weight"]
    (tmp_path / "source").mkdir()
    write_tensors(tmp_path / "source", tensors, shards=2)
    (tmp_path / "source/config.json").write_text((source / "config.json").read_text())
    with pytest.raises(CcqError, match=r"1 tensor is missing, the first '.*experts.6.up_proj"):
        quantize(tmp_path / "source", tmp_path / "out", preset="fast", quiet=True)


def test_the_dry_run_from_config_json_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    assert main(["--model", str(tmp_path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "vision_model" in shown and "experts" in shown
    assert main(["--model", str(tmp_path), "--dry-run", "--target", "fastdeploy"]) == 2
    assert "FastDeploy serves ERNIE-4.5 text models" in capsys.readouterr().err


def test_no_place_is_taken_twice():
    tensors = read_config(PUBLISHED).tensors
    places = {(t.role, t.layer, t.expert, t.projection) for t in tensors.values()}
    assert len(places) == len(tensors)
    assert sum(t.role is Role.ROUTER for t in tensors.values()) == 2 * 27
