# SPDX-License-Identifier: Apache-2.0
"""The verify command: what is sound, what is caught, exit codes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.errors import CcqError
from paddle_ccq.quantize import quantize
from paddle_ccq.verify import main, verify

CONFIG = tiny_config(num_hidden_layers=2, moe_num_experts=2)
EXPERT = "ernie.layers.1.mlp.experts.0.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("made")
    write_checkpoint(root / "m", CONFIG)
    quantize(root / "m", root / "out", preset="fast", max_shard_size="150kB", quiet=True)
    return root / "m", root / "out"


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "copy"))


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def change(folder: Path, name: str, edit) -> None:
    """Rewrite one tensor; the manifest goes, as in a checkpoint that others made."""
    path = shard_of(folder, name)
    tensors = load_file(path)
    tensors[name] = edit(tensors[name].copy())
    save_file(tensors, path, metadata={"format": "np"})
    (folder / "ccq-manifest.json").unlink(missing_ok=True)


def set_first(value):
    def edit(array):
        array.reshape(-1)[0] = value
        return array

    return edit


def test_sound(made, capsys, tmp_path):
    model, out = made
    report = tmp_path / "report.json"
    assert main([str(out), "--reference", str(model), "--json", str(report)]) == 0
    text = capsys.readouterr().out
    assert "sound: " in text and "worst" in text and "unquantized tensors equal" in text
    content = json.loads(report.read_text())
    assert content["sound"] is True and content["problems"] == []
    by_name = {m["name"]: m for m in content["matrices"]}
    assert 0.05 < by_name[f"{EXPERT}.weight"]["rel_mse"] < 0.12
    assert by_name["ernie.layers.0.self_attn.qkv_proj.weight"]["rel_mse"] < 1e-3


def test_json_is_not_overwritten_unasked(made, capsys, tmp_path):
    report = tmp_path / "report.json"
    report.write_text("mine")
    assert main([str(made[1]), "--json", str(report)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert report.read_text() == "mine"
    assert main([str(made[1]), "--json", str(report), "--force"]) == 0
    assert json.loads(report.read_text())["sound"] is True


def test_errors_agree_with_those_of_the_run(made, tmp_path):
    model, _ = made
    result = quantize(model, tmp_path / "out", wint4_end_layer=0, preset="fast", quiet=True)
    found = {m["name"]: m["rel_mse"] for m in verify(tmp_path / "out", model).matrices}
    for record in result.records:
        if "rel_mse" in record["stats"]:
            assert found[record["name"]] == pytest.approx(record["stats"]["rel_mse"], rel=1e-3)


def only_problem(folder: Path, **options) -> str:
    result = verify(folder, **options)
    assert len(result.problems) == 1, result.problems
    return result.problems[0]


def test_flipped_bit(copy, capsys):
    path = shard_of(copy, f"{EXPERT}.quant_weight")
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)
    assert "sha256 differs" in only_problem(copy)
    assert verify(copy, hashes=False).sound
    assert main([str(copy)]) == 1
    text = capsys.readouterr().out
    assert f"problem: {path.name}: sha256 differs" in text and "NOT sound" in text
    assert main([str(copy), "--no-hash"]) == 0


def test_missing_shard(copy):
    path = shard_of(copy, f"{EXPERT}.quant_weight")
    path.unlink()
    problems = verify(copy).problems
    assert f"{path.name}: missing" in problems
    assert any("more: missing" in problem for problem in problems)


def test_short_tensor(copy):
    path = shard_of(copy, f"{EXPERT}.quant_weight")
    os.truncate(path, path.stat().st_size - 64)
    problems = verify(copy, hashes=False).problems
    assert any("truncated" in p and p.startswith(path.name) for p in problems)


def test_wrong_shape_and_dtype(copy):
    change(copy, f"{EXPERT}.weight_scale", lambda a: a[:, :-8])
    change(copy, f"{EXPERT}.super_scales", lambda a: a.astype(np.float32))
    problems = verify(copy).problems
    assert f"{EXPERT}.weight_scale: shape [1, 120], should be [1, 128]" in problems
    assert f"{EXPERT}.super_scales: dtype F32, should be BF16" in problems


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (f"{EXPERT}.super_scales", np.nan, "1 of 128 values are NaN or infinite"),
        (f"{EXPERT}.super_scales", -1.0, "negative scales"),
        (f"{EXPERT}.code_scale", np.inf, "NaN or infinite"),
        (f"{EXPERT}.code_zp", np.nan, "NaN or infinite"),
        (f"{EXPERT}.code_zp", 3000.0, "outside 0..32767"),
        (f"{EXPERT}.code_zp", -900.0, "outside 0..32767"),
        (f"{EXPERT}.code_scale", -121.0, "outside 0..32767"),
        ("ernie.layers.0.self_attn.o_proj.weight_scale", np.nan, "NaN or infinite"),
        ("ernie.embed_tokens.weight", np.inf, "NaN or infinite"),
        ("ernie.layers.1.mlp.gate.weight", np.nan, "NaN or infinite"),
    ],
)
def test_bad_values(copy, name, value, text):
    change(copy, name, set_first(value))
    assert text in only_problem(copy)


def test_missing_and_foreign_files(copy):
    (copy / "tokenizer.json").unlink()
    problems = verify(copy).problems
    assert "tokenizer.json: listed in ccq-manifest.json but missing" in problems
    (copy / "model.safetensors").write_bytes(b"")
    (copy / "model_state.pdparams").write_bytes(b"")
    problems = verify(copy).problems
    assert any("FastDeploy would load this file instead of the shards" in p for p in problems)
    assert any("FastDeploy would load this pickle file" in p for p in problems)


def test_missing_and_unknown_tensors(copy):
    path = shard_of(copy, f"{EXPERT}.code_zp")
    tensors = load_file(path)
    tensors["ernie.layers.1.mlp.experts.0.down_proj.bias"] = tensors.pop(f"{EXPERT}.code_zp")
    save_file(tensors, path)
    problems = verify(copy, hashes=False).problems
    assert any(f"{EXPERT}.code_zp is not in it" in p for p in problems)
    assert any("down_proj.bias: not a tensor of this model" in p for p in problems)


def test_no_manifest_is_said_and_is_no_problem(copy):
    (copy / "ccq-manifest.json").unlink()
    result = verify(copy)
    assert result.sound
    assert any("hashes can't be checked" in message for message in result.messages)


def edit_config(folder: Path, edit) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    (folder / "ccq-manifest.json").unlink(missing_ok=True)


def test_config_rules(copy):
    edit_config(copy, lambda c: c.update(torch_dtype="bfloat16"))
    assert "torch_dtype" in only_problem(copy)
    edit_config(copy, lambda c: c.pop("torch_dtype"))
    edit_config(copy, lambda c: c.update(transformers_version="4.57.0"))
    assert "transformers_version" in only_problem(copy)


def test_config_that_promises_another_format(copy):
    def promise(config):
        moe = config["quantization_config"]["moe_quant_config"]
        moe["moe_w4_quant_config"]["quant_end_layer"] = 1

    edit_config(copy, promise)
    assert any("quant_weight: shape" in problem for problem in verify(copy).problems)


def test_wrong_row_order_is_seen_with_the_reference(made, copy):
    edit_config(copy, lambda c: c["paddle_ccq"].update(row_order="plain"))
    assert verify(copy).sound
    problems = verify(copy, made[0]).problems
    assert any("the rows are in fastdeploy-2.1 order, not plain" in p for p in problems)


def test_checkpoint_of_others(made, copy):
    edit_config(copy, lambda c: c.pop("paddle_ccq"))
    result = verify(copy, made[0])
    assert result.sound
    assert any("not written by paddle-ccq" in message for message in result.messages)


def test_other_weights_than_the_reference(made, copy):
    change(copy, "ernie.norm.weight", set_first(5.0))
    change(copy, f"{EXPERT}.quant_weight", lambda a: a[::-1].copy())
    problems = verify(copy, made[0]).problems
    assert "ernie.norm.weight: not the reference's values" in problems
    assert any(p.startswith(f"{EXPERT}.weight: rel-MSE") for p in problems)


def test_rank_folders(made, tmp_path):
    model = tmp_path / "m"
    config = tiny_config(num_hidden_layers=2, moe_num_experts=2, moe_intermediate_size=256)
    write_checkpoint(model, config)
    out = tmp_path / "out"
    quantize(model, out, tensor_parallel_size=2, preset="fast", quiet=True)
    assert verify(out, model).sound
    change(out / "rank1", f"{EXPERT}.super_scales", set_first(ml_dtypes.bfloat16(np.nan)))
    assert any(p.startswith("rank1: ") for p in verify(out, hashes=False).problems)
    shutil.rmtree(out / "rank1")
    with pytest.raises(CcqError, match="not a whole set"):
        verify(out)


@pytest.mark.parametrize("what", ["float", "absent", "partial", "other model", "index"])
def test_bad_input_is_exit_code_2(made, copy, tmp_path, capsys, what):
    model, _ = made
    if what == "float":
        flags = [str(model)]
    elif what == "absent":
        flags = [str(tmp_path / "none")]
    elif what == "partial":
        copy.rename(tmp_path / "x.ccq-partial")
        flags = [str(tmp_path / "x.ccq-partial")]
    elif what == "other model":
        write_checkpoint(tmp_path / "other", tiny_config())
        flags = [str(copy), "--reference", str(tmp_path / "other")]
    else:
        (copy / "model.safetensors.index.json").unlink()
        assert main([str(copy)]) == 1
        flags = [str(copy), "--reference", str(copy)]
    assert main(flags) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
