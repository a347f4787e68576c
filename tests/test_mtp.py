# SPDX-License-Identifier: Apache-2.0
"""Layers for multi-token prediction are kept, left out when asked, and never half there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from helpers.mtp import with_layer
from helpers.runs import stop_after
from helpers.synthetic import (
    random_weights,
    stored_weights,
    tiny_config,
    write_checkpoint,
    write_tensors,
)
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.dequantize import dequantize
from paddle_ccq.errors import CcqError
from paddle_ccq.families.registry import read_config
from paddle_ccq.quantize import main, quantize
from paddle_ccq.targets.inspect import inspect
from paddle_ccq.verify import verify

CONFIG = tiny_config(num_nextn_predict_layers=1)
OPTIONS = {"preset": "fast", "quiet": True}
BLOCK = "ernie.mtp_block.0."
# As FastDeploy's models/ernie4_5_mtp.py asks for them in a checkpoint that is quantized.
PACKED = {
    f"{BLOCK}{matrix}.{suffix}"
    for matrix in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.up_gate_proj", "mlp.down_proj")
    for suffix in ("quant_weight", "weight_scale")
}
PLAIN = {
    "ernie.mtp_emb_norm.0.weight": (128,),
    "ernie.mtp_hidden_norm.0.weight": (128,),
    "ernie.mtp_linear_proj.0.weight": (256, 128),
    f"{BLOCK}input_layernorm.weight": (128,),
    f"{BLOCK}post_attention_layernorm.weight": (128,),
}


def written(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: value
        for file in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mtp") / "source"
    write_checkpoint(folder, CONFIG)
    return folder


@pytest.fixture(scope="module")
def output(source) -> Path:
    out = source.with_name("out")
    quantize(source, out, **OPTIONS)
    return out


@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_the_layer_is_written_as_fastdeploy_reads_it(tmp_path, layout):
    weights = write_checkpoint(tmp_path / "source", CONFIG, layout)
    quantize(tmp_path / "source", tmp_path / "out", **OPTIONS)
    tensors = written(tmp_path / "out")
    found = {name for name in tensors if ".mtp_" in name}
    assert found == PACKED | PLAIN.keys()
    for name, shape in PLAIN.items():
        assert tensors[name].shape == shape
        np.testing.assert_array_equal(tensors[name].astype(np.float32), weights[name])
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 1
    reread = open_checkpoint(tmp_path / "out")
    for name in weights:
        if name.startswith(BLOCK) and name.endswith("_proj.weight"):
            assert reread.format_of(name) == "wint8"
            error = reread.read(name) - weights[name]
            assert np.square(error).sum() < 1e-3 * np.square(weights[name]).sum()


def test_other_tensors_are_those_of_the_model_without_it(tmp_path, source, output):
    plain = tmp_path / "plain"
    write_checkpoint(plain, tiny_config())
    quantize(plain, tmp_path / "out", **OPTIONS)
    wanted, found = written(tmp_path / "out"), written(output)
    assert found.keys() - wanted.keys() == PACKED | PLAIN.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)


def test_drop_mtp_leaves_it_out(tmp_path, source, output, capsys):
    assert main(["--model", str(source), "--output", str(tmp_path / "out"), "--preset", "fast",
                 "--drop-mtp"]) == 0  # fmt: skip
    assert (
        "--drop-mtp: 12 stored tensors for multi-token prediction are left out"
        in capsys.readouterr().err
    )
    whole, found = written(output), written(tmp_path / "out")
    assert {name: v.tobytes() for name, v in found.items()} == {
        name: v.tobytes() for name, v in whole.items() if ".mtp_" not in name
    }
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 0
    for folder in (output, tmp_path / "out"):
        result = verify(folder, source)
        assert result.sound, result.problems


def test_the_dry_run_counts_it(source, capsys):
    for flags, there in (([], True), (["--drop-mtp"], False)):
        assert main(["--model", str(source), "--dry-run", *flags]) == 0
        assert ("mtp_block" in capsys.readouterr().out) is there


def test_rank_folders_cut_it(tmp_path):
    config = tiny_config(num_nextn_predict_layers=1, moe_intermediate_size=256)
    weights = write_checkpoint(tmp_path / "wide", config)
    quantize(tmp_path / "wide", tmp_path / "ranks", **OPTIONS, tensor_parallel_size=2)
    parts = [written(tmp_path / "ranks" / f"rank{rank}") for rank in range(2)]
    name = "ernie.mtp_linear_proj.0.weight"
    joined = np.concatenate([part[name] for part in parts], axis=1).astype(np.float32)
    np.testing.assert_array_equal(joined, weights[name])
    assert verify(tmp_path / "ranks", tmp_path / "wide").sound


def test_a_layer_that_was_never_published_is_taken_as_none(tmp_path, output):
    weights = random_weights(CONFIG)
    plain = {name: value for name, value in weights.items() if ".mtp_" not in name}
    folder = tmp_path / "source"
    write_checkpoint(folder, CONFIG)
    (folder / "model.safetensors").unlink()
    write_tensors(folder, stored_weights(CONFIG, plain, "pt", "bf16"))
    (message,) = (m for m in open_checkpoint(folder).messages if "num_nextn" in m)
    assert "says num_nextn_predict_layers 1, but no tensor of that layer is stored" in message
    quantize(folder, tmp_path / "out", **OPTIONS)
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 0
    assert verify(tmp_path / "out", folder).sound
    # A checkpoint of another program, whose config.json says 1.
    says = {**config_of(tmp_path / "out"), "num_nextn_predict_layers": 1}
    own = says.pop("paddle_ccq")
    (tmp_path / "out" / "config.json").write_text(json.dumps(says))
    assert not inspect(tmp_path / "out").config.num_nextn_predict_layers
    # In one of this package the layer has been lost.
    (tmp_path / "out" / "config.json").write_text(json.dumps({**says, "paddle_ccq": own}))
    (tmp_path / "out" / "ccq-manifest.json").unlink()
    (problem,) = verify(tmp_path / "out").problems
    assert "mtp_" in problem and problem.endswith(" and 12 more: missing")


@pytest.mark.parametrize("name", ["mtp_linear_proj.0", "mtp_block.0.mlp.up_proj"])
def test_half_a_layer_is_refused(tmp_path, name):
    stored = stored_weights(CONFIG, random_weights(CONFIG), "pt", "bf16")
    del stored[f"model.{name}.weight"]
    write_checkpoint(tmp_path / "source", CONFIG)
    (tmp_path / "source" / "model.safetensors").unlink()
    write_tensors(tmp_path / "source", stored)
    with pytest.raises(CcqError, match=f"1 tensor is missing, the first 'model.{name}.weight'"):
        quantize(tmp_path / "source", tmp_path / "out", **OPTIONS)


def test_a_float_copy_has_the_layer_too(tmp_path, output):
    dequantize(output, tmp_path / "out", naming="pt")
    names = written(tmp_path / "out").keys()
    wanted = stored_weights(CONFIG, random_weights(CONFIG), "pt", "bf16").keys()
    assert names == wanted
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 1


def test_what_computes_tokens_does_not_hold_it(source):
    checkpoint = open_checkpoint(source)
    apart = set(checkpoint.names()) - set(checkpoint.model_names())
    assert len(apart) == 9 and all(".mtp_" in name for name in apart)
    config = read_config(CONFIG)
    assert [config.is_prediction(t) for t in config.tensors.values()].count(True) == 9
    without = config.without_mtp()
    assert set(config.tensors) - set(without.tensors) == apart
    assert config.raw["num_nextn_predict_layers"] == 1 and without.raw == {
        **config.raw,
        "num_nextn_predict_layers": 0,
    }


# --- other families ---


@pytest.mark.parametrize("case", ["deepseek-v3", "glm-4.5"])
def test_a_layer_with_experts_is_kept_with_its_experts_packed(tmp_path, case):
    added = with_layer(tmp_path / "source", case)
    assert any(".experts." in name for name in added)
    assert any(name.endswith(".eh_proj.weight") for name in added)
    for folder, drop in (("kept", False), ("dropped", True)):
        quantize(tmp_path / "source", tmp_path / folder, **OPTIONS, drop_mtp=drop)
        result = verify(tmp_path / folder, tmp_path / "source")
        assert result.sound, result.problems
    source = written(tmp_path / "source")
    kept, dropped = written(tmp_path / "kept"), written(tmp_path / "dropped")
    layer = f"layers.{read_config(config_of(tmp_path / 'source')).num_hidden_layers}."
    extra = {name for name in kept if layer in name}
    assert {name for name in added if ".experts." not in name} < extra
    for name in extra & added:
        np.testing.assert_array_equal(kept[name].view(np.uint16), source[name].view(np.uint16))
    packed = {name for name in extra - added if ".experts." in name}
    assert packed == extra - added and any(name.endswith(".super_scales") for name in packed)
    assert dropped.keys() == kept.keys() - extra
    for name, value in dropped.items():
        np.testing.assert_array_equal(value.view(np.uint8), kept[name].view(np.uint8))
    assert config_of(tmp_path / "kept")["num_nextn_predict_layers"] == 1
    assert config_of(tmp_path / "dropped")["num_nextn_predict_layers"] == 0
    modules = config_of(tmp_path / "kept")["quantization_config"]["experts"].keys()
    left = config_of(tmp_path / "dropped")["quantization_config"]["experts"].keys()
    assert modules - left == {f"model.{layer}mlp.experts"}


def test_a_layer_of_a_place_of_its_own_is_dropped_whole(tmp_path):
    from helpers import family_models

    config = {**family_models.by_name("qwen3.5-moe").config, "mtp_num_hidden_layers": 1}
    model = read_config(config)
    names = {n for n, t in model.tensors.items() if model.is_prediction(t)}
    assert {"mtp.fc.weight", "mtp.norm.weight"} < names
    assert all(name.startswith("mtp.") for name in names)
    without = model.without_mtp()
    assert set(model.tensors) - set(without.tensors) == names
    assert without.raw["mtp_num_hidden_layers"] == 0
    assert without.moe_layers() == list(range(model.num_hidden_layers))
    nested = read_config(
        {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "model_type": "qwen3_5_moe",
            "text_config": {k: v for k, v in config.items() if k != "architectures"},
        }
    )
    assert nested.without_mtp().raw["text_config"]["mtp_num_hidden_layers"] == 0
    assert nested.raw["text_config"]["mtp_num_hidden_layers"] == 1


def test_a_run_goes_on_with_the_same_choice_alone(tmp_path, source, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "out", **OPTIONS)
    with pytest.raises(CcqError, match="not the same: --drop-mtp") as error:
        quantize(source, tmp_path / "out", **OPTIONS, drop_mtp=True)
    assert "--drop-mtp, only now" in str(error.value)
    quantize(source, tmp_path / "out", **OPTIONS)
    assert any(".mtp_" in name for name in written(tmp_path / "out"))
