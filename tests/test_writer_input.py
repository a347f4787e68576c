# SPDX-License-Identifier: Apache-2.0
"""Input that must be refused, or that must come out unharmed, when a checkpoint is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.checkpoint.values import count_nonfinite
from paddle_ccq.errors import CcqError
from paddle_ccq.quantize import quantize
from paddle_ccq.verify import verify

CONFIG = tiny_config(num_hidden_layers=2, moe_num_experts=2)
OPTIONS = {"preset": "fast", "quiet": True}
EXPERT = "model.layers.1.mlp.experts.1.up_proj.weight"


def with_bad_value(folder: Path, value: float, name: str = EXPERT, dtype: str = "bf16") -> None:
    weights = write_checkpoint(folder, CONFIG, dtype=dtype)
    del weights
    with safe_open(folder / "model.safetensors", framework="np") as file:
        tensor = file.get_tensor(name).copy()
    tensor.reshape(-1)[5] = value
    write_checkpoint(folder, CONFIG, dtype=dtype, extra={name: tensor})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", [EXPERT, "model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"]
)
def test_nonfinite_weights_are_refused_by_name(tmp_path, value, name):
    with_bad_value(tmp_path / "m", value, name)
    with pytest.raises(CcqError, match="1 values that are NaN or infinite") as caught:
        quantize(tmp_path / "m", tmp_path / "out", **OPTIONS)
    stem = name.split(".")[-2].replace("up_proj", "up_gate_proj").replace("k_proj", "qkv_proj")
    assert stem in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_nonfinite_weights_can_be_set_to_zero(tmp_path, dtype):
    with_bad_value(tmp_path / "m", np.nan, dtype=dtype)
    result = quantize(tmp_path / "m", tmp_path / "out", allow_nonfinite=True, **OPTIONS)
    counts = [r["stats"].get("nonfinite_set_to_zero", 0) for r in result.records]
    assert sum(counts) == 1
    assert "1 weights of the source were NaN" in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out").sound


def test_count_nonfinite_by_dtype():
    values = np.array([0, 1, np.nan, np.inf, -np.inf, 3e38], np.float32)
    assert count_nonfinite(values) == 3
    assert count_nonfinite(values.astype(ml_dtypes.bfloat16)) == 3
    assert count_nonfinite(values[:5].astype(np.float16)) == 3


def test_missing_shard(tmp_path):
    write_checkpoint(tmp_path / "m", CONFIG, shards=3)
    (tmp_path / "m" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CcqError, match=r"model-00002-of-00003\.safetensors.*missing"):
        quantize(tmp_path / "m", tmp_path / "out", **OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_truncated_shard(tmp_path):
    write_checkpoint(tmp_path / "m", CONFIG)
    file = tmp_path / "m" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(CcqError, match="truncated"):
        quantize(tmp_path / "m", tmp_path / "out", **OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_pickles_are_refused(tmp_path):
    write_checkpoint(tmp_path / "m", CONFIG)
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "model_state.pdparams")
    with pytest.raises(CcqError, match="pickle"):
        quantize(tmp_path / "m", tmp_path / "out", **OPTIONS)


def test_quantized_input_is_refused(tmp_path):
    write_checkpoint(tmp_path / "m", CONFIG)
    quantize(tmp_path / "m", tmp_path / "a", **OPTIONS)
    with pytest.raises(CcqError, match="quantized already"):
        quantize(tmp_path / "a", tmp_path / "b", **OPTIONS)


def test_output_inside_the_model_is_refused(tmp_path):
    write_checkpoint(tmp_path / "m", CONFIG)
    with pytest.raises(CcqError, match="lies in the model's own folder"):
        quantize(tmp_path / "m", tmp_path / "m" / "out", **OPTIONS)
    with pytest.raises(CcqError, match="lies in the model's own folder"):
        quantize(tmp_path / "m", tmp_path / "m", **OPTIONS)


def test_output_depends_on_nothing_but_the_input(tmp_path):
    write_checkpoint(tmp_path / "m", CONFIG)
    quantize(tmp_path / "m", tmp_path / "a", threads=1, **OPTIONS)
    quantize(tmp_path / "m", tmp_path / "somewhere" / "else" / "b", threads=2, **OPTIONS)
    for path in sorted((tmp_path / "a").iterdir()):
        other = tmp_path / "somewhere" / "else" / "b" / path.name
        assert path.read_bytes() == other.read_bytes(), path.name
    for path in (tmp_path / "a").iterdir():
        if path.suffix in (".json", ".md"):
            assert str(tmp_path) not in path.read_text()


def test_kept_tensors_are_exact(tmp_path):
    weights = write_checkpoint(tmp_path / "m", tiny_config(tie_word_embeddings=False), dtype="f16")
    quantize(tmp_path / "m", tmp_path / "out", **OPTIONS)
    with safe_open(tmp_path / "out" / "model-00001-of-00001.safetensors", framework="np") as file:
        for name in ("ernie.embed_tokens.weight", "lm_head.weight", "ernie.norm.weight"):
            expected = weights[name].astype(ml_dtypes.bfloat16)
            assert file.get_tensor(name).tobytes() == expected.tobytes()
        for name in ("mlp.gate.weight", "mlp.moe_statics.e_score_correction_bias"):
            name = f"ernie.layers.1.{name}"
            assert file.get_tensor(name).dtype == np.float32
            assert file.get_tensor(name).tobytes() == weights[name].tobytes()


def test_wide_matrices_are_encoded_in_slices_with_the_same_bytes(tmp_path, monkeypatch):
    from paddle_ccq.checkpoint import convert

    write_checkpoint(tmp_path / "m", CONFIG)
    quantize(tmp_path / "m", tmp_path / "a", wint4_end_layer=1, **OPTIONS)
    monkeypatch.setattr(convert, "SLICE_WEIGHTS", 5000)
    quantize(tmp_path / "m", tmp_path / "b", wint4_end_layer=1, **OPTIONS)
    file = "model-00001-of-00001.safetensors"
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_dense_layers_left_in_bf16(tmp_path):
    weights = write_checkpoint(tmp_path / "m", CONFIG)
    rules = tmp_path / "rules.yaml"
    rules.write_text('- {match: "*.self_attn.o_proj", format: bf16}\n')
    quantize(tmp_path / "m", tmp_path / "out", rules=rules, **OPTIONS)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == [
        "ernie.layers.0.self_attn.o_proj",
        "ernie.layers.1.self_attn.o_proj",
    ]
    name = "ernie.layers.1.self_attn.o_proj"
    with safe_open(tmp_path / "out" / "model-00001-of-00001.safetensors", framework="np") as file:
        kept = file.get_tensor(f"{name}.quant_weight").astype(np.float32)
    np.testing.assert_array_equal(kept, weights[f"{name}.weight"])
    assert verify(tmp_path / "out", tmp_path / "m").sound
