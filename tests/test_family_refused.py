# SPDX-License-Identifier: Apache-2.0
"""Sources and flags of other families that are not right: one line says what is wrong."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest

from helpers.family_models import by_name, write_source
from helpers.family_runs import OPTIONS, changed_source, stored
from helpers.published import FP8_CONFIG, fp8
from helpers.synthetic import write_tensors
from paddle_ccq.dequantize import main as dequantize_main
from paddle_ccq.errors import CcqError
from paddle_ccq.evaluate import main as evaluate_main
from paddle_ccq.families.registry import read_config
from paddle_ccq.quantize import main, quantize
from paddle_ccq.sample import main as sample_main
from paddle_ccq.sensitivity import main as sensitivity_main
from paddle_ccq.tune import main as tune_main
from paddle_ccq.verify import verify

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({EXPERT: None}, f"1 tensor is missing, the first '{EXPERT}'"),
        ({"model.norm.weight": None}, "1 tensor is missing, the first 'model.norm.weight'"),
        ({"lm_head.weight": None}, "lm_head.weight"),
        (
            {EXPERT.replace(".3.", ".4."): np.zeros((128, 128), np.float32)},
            "is not called for by config.json: 4 experts of width 128 in 1 layers",
        ),
        (
            {EXPERT.replace("layers.1", "layers.0"): np.zeros((128, 128), np.float32)},
            "is not called for by config.json",
        ),
        ({EXPERT: np.zeros((64, 128), np.float32)}, r"has shape \[64, 128\], config.json calls"),
        ({EXPERT: np.full((128, 128), np.nan, np.float32)}, "NaN or infinite"),
        ({"model.norm.weight": np.full(128, np.inf, np.float32)}, "NaN or infinite"),
    ],
)
def test_sources_that_are_not_right_are_refused(changes, problem, made, tmp_path):
    source = changed_source(made(by_name("qwen3-moe")), tmp_path / "source", **changes)
    with pytest.raises(CcqError, match=problem):
        quantize(source, tmp_path / "output", **OPTIONS)
    assert not (tmp_path / "output").exists()


def test_values_that_cannot_be_stored_are_set_to_zero_if_asked(made, tmp_path):
    norm = np.ones(128, np.float32)
    norm[3] = np.nan
    plain = made(by_name("qwen3-moe"))
    source = changed_source(plain, tmp_path / "source", **{"model.norm.weight": norm})
    quantize(source, tmp_path / "output", allow_nonfinite=True, **OPTIONS)
    found = stored(tmp_path / "output")["model.norm.weight"]
    assert found[3] == 0
    assert found.sum() == 127
    assert verify(tmp_path / "output", source).sound


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--target", "fastdeploy"], "and no Qwen3MoeForCausalLM; leave --target out"),
        (["--target", "fastdeploy", "--family", "generic"], "leave one of the two out"),
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size: is for --target fastdeploy"),
        (["--fastdeploy-layout", "2.0"], "--fastdeploy-layout: is for --target fastdeploy"),
        (["--calibration", "TEXT"], "--calibration: computes the model"),
        (["--allocate", "2.3bpw", "--calibration", "TEXT"], "computes the model"),
        (["--wint4-end-layer", "7"], "this model's layers are 0 to 1"),
        (["--rules", "RULES"], "everything but the routed experts stays as it is"),
    ],
)
def test_what_other_families_cannot_have(flags, problem, made, tmp_path, capsys):
    (tmp_path / "TEXT").with_suffix(".jsonl").write_text('{"text": "one two three"}\n')
    (tmp_path / "RULES.yaml").write_text("- {match: '*self_attn*', format: wint8}\n")
    flags = [
        str(tmp_path / {"TEXT": "TEXT.jsonl", "RULES": "RULES.yaml"}.get(flag, flag))
        if flag in ("TEXT", "RULES")
        else flag
        for flag in flags
    ]
    source = made(by_name("qwen3-moe")).source
    assert main([str(source), "--output", str(tmp_path / "output"), *flags]) == 2
    said = capsys.readouterr().err
    assert problem in said
    assert said.count("\n") == 1
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("command", ["evaluate", "sample", "sensitivity", "tune"])
def test_commands_that_compute_the_model_say_that_they_cannot(command, made, tmp_path, capsys):
    pytest.importorskip("paddle")
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one two three"}\n' * 8)
    found = made(by_name("qwen3-moe"))
    run, flags = {
        "evaluate": (evaluate_main, [str(found.output), "--text", str(text)]),
        "sample": (sample_main, [str(found.source), "--output", str(tmp_path / "new.jsonl")]),
        "sensitivity": (
            sensitivity_main,
            [str(found.source), "--calibration", str(text), "--json", str(tmp_path / "s.json")],
        ),
        "tune": (
            tune_main,
            [
                *(str(found.output), "--reference", str(found.source)),
                *("--calibration", str(text), "--output", str(tmp_path / "tuned")),
            ],
        ),
    }[command]
    assert run(flags) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{command}: computes the model, which this package does for ERNIE-4.5 alone" in said


def test_dequantize_knows_the_families_namings(made, tmp_path, capsys):
    found = made(by_name("qwen3-moe"))
    flags = [str(found.output), "--output", str(tmp_path / "x"), "--naming", "paddle"]
    assert dequantize_main(flags) == 2
    assert "--naming paddle: Qwen3-MoE checkpoints have pt" in capsys.readouterr().err


def test_a_null_is_the_fault_of_its_own_key(tmp_path):
    config = {**by_name("qwen3-moe").config, "num_experts": None, "num_local_experts": None}
    for gone, named in ((["num_experts"], "num_local_experts"), ([], "num_experts")):
        found = {key: value for key, value in config.items() if key not in gone}
        with pytest.raises(CcqError, match=f" {named}: missing"):
            read_config(found)


# --- hostile folders ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("qwen3-moe", {"mlp_only_layers": 3}, "mlp_only_layers: 3 is not a list of layers"),
        ("qwen3-moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers: .* is not a list of layers"),
        ("qwen3-moe", {"attention_bias": "no"}, "attention_bias: 'no' is neither true nor false"),
        ("qwen3-moe", {"num_experts": None}, "num_experts: missing"),
        ("qwen3-moe", {"num_local_experts": 8}, "num_experts: 4, but num_local_experts says 8"),
        ("qwen3-moe", {"num_experts": 0, "num_experts_per_tok": 1}, "this model has no routed"),
        ("qwen3-moe", {"num_experts_per_tok": 9}, "num_experts_per_tok: 9 is not an integer from"),
        ("qwen3-moe", {"hidden_size": 1 << 40}, "hidden_size: 1099511627776 is not an integer"),
        ("qwen3-moe", {"dtype": "float8"}, "dtype: 'float8' is not one of"),
        ("qwen3-moe", {"text_config": 3}, "text_config: 3 is not an object"),
        ("deepseek-v3", {"kv_lora_rank": None}, "kv_lora_rank: missing"),
        ("deepseek-v3", {"n_routed_experts": None}, "n_routed_experts: missing"),
        ("deepseek-v3", {"n_routed_experts": 0}, "this model has no routed experts"),
        ("deepseek-v3", {"n_routed_experts": -1}, "n_routed_experts: -1 is not an integer"),
        ("glm-4.5", {"n_routed_experts": None}, "n_routed_experts: missing"),
        ("minimax-m2", {"num_local_experts": None}, "num_local_experts: missing"),
        ("minimax-m2", {"num_local_experts": 0}, "this model has no routed experts"),
        ("deepseek-v3", {"first_k_dense_replace": -1}, "first_k_dense_replace: -1 is not"),
        ("deepseek-v3", {"num_nextn_predict_layers": 1000}, "num_nextn_predict_layers: 1000 is"),
        ("qwen3.5-moe-vision", {"vision_config": {"depth": -1}}, "vision_config: depth: -1 is not"),
        ("qwen3-moe", {"quantization_config": {"quant_method": "awq"}}, "'awq' is not read"),
    ],
)
def test_fields_of_config_json_that_are_none(name, changes, problem, tmp_path):
    config = {k: v for k, v in {**by_name(name).config, **changes}.items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CcqError, match=problem) as error:
        quantize(tmp_path, dry_run=True, **OPTIONS)
    assert "\n" not in str(error.value)


def test_verify_says_one_thing_of_one_fault(made, tmp_path):
    plain = made(by_name("deepseek-v3"))
    config = {**plain.case.config, "quantization_config": FP8_CONFIG}
    dense = "model.layers.0.self_attn.o_proj.weight"
    tensors = stored(plain.source)
    tensors[dense], scales = fp8(tensors[dense].astype(np.float32))
    tensors[f"{dense}_scale_inv"] = scales
    source = write_source(tmp_path / "source", config, tensors)
    quantize(source, tmp_path / "output", **OPTIONS)
    output = stored(tmp_path / "output")

    def problems(change: Any) -> list[str]:
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "output", folder)
        changed = dict(output)
        change(changed)
        for path in folder.glob("model*"):
            path.unlink()
        (folder / "ccq-manifest.json").unlink()
        write_tensors(folder, changed, 3)
        found = verify(folder).problems
        assert not [problem for problem in found if str(folder) in problem]
        return found

    assert problems(lambda t: None) == []
    (said,) = problems(lambda t: t.update({f"{dense}_scale_inv": -scales}))
    assert "is no positive number; the file is damaged" in said
    (said,) = problems(lambda t: t.pop("model.layers.1.self_attn.o_proj.weight"))
    # By config.json it is in FP8, with scales.
    assert said == "model.layers.1.self_attn.o_proj.weight and 1 more: missing"
    said = problems(lambda t: t.pop(f"{dense}_scale_inv"))
    assert "its scales" in said[0]
    assert said[1:] == [f"{dense}_scale_inv: missing"]
    (tmp_path / "broken" / "model-00002-of-00003.safetensors").unlink()
    said = verify(tmp_path / "broken").problems
    assert not any("dtype" in line for line in said), said
