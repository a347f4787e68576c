# SPDX-License-Identifier: Apache-2.0
"""Models of other families that lose or swap a weight between their source and its copies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from helpers.family_models import (
    CASES,
    Tensors,
    by_name,
    stacked_tensors,
    write_source,
)
from helpers.family_runs import OPTIONS, Made, changed_source, entry_of, stored
from helpers.published import FP8_CONFIG, fp8, from_fp8, from_int4, int4, int4_config
from helpers.runs import contents, stop_after
from helpers.synthetic import tiny_config, write_checkpoint, write_tensors
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.codec import formats
from paddle_ccq.dequantize import dequantize
from paddle_ccq.dequantize import main as dequantize_main
from paddle_ccq.errors import CcqError
from paddle_ccq.evaluate import main as evaluate_main
from paddle_ccq.families.registry import read_config
from paddle_ccq.families.tensor import EXACT_ROLES
from paddle_ccq.quantize import QuantizeOptions, main, quantize
from paddle_ccq.sample import main as sample_main
from paddle_ccq.sensitivity import main as sensitivity_main
from paddle_ccq.tune import main as tune_main
from paddle_ccq.verify import verify


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_all_but_the_experts_is_the_source_byte_for_byte(case, made):
    found = made(case)
    source, output = stored(found.source), stored(found.output)
    entry = entry_of(found.output)
    kept = {name: value for name, value in source.items() if ".experts." not in name}
    packed = {
        name for name in output if any(name.startswith(f"{module}.") for module in entry["experts"])
    }
    assert output.keys() - packed == kept.keys()
    for name, value in kept.items():
        assert output[name].dtype == value.dtype
        assert output[name].tobytes() == value.tobytes(), name
    suffixes = {name.rpartition(".")[2] for name in packed}
    assert suffixes == set(formats.tensor_specs("wint2", 128, 128))
    assert {name.split(".")[-2] for name in packed} == {"gate_up_proj", "down_proj"}
    assert (entry["quant_method"], entry["family"]) == ("ccq", case.family)
    assert entry["source_quantization_config"] is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_stacked_experts_give_the_same_checkpoint(case, made, tmp_path):
    found = made(case)
    stacks = stacked_tensors(stored(found.source))
    assert len(stacks) < len(stored(found.source))
    write_source(tmp_path / "stacked", found.case.config, stacks)
    quantize(tmp_path / "stacked", tmp_path / "output", **OPTIONS)
    expected, output = stored(found.output), stored(tmp_path / "output")
    renamed = {
        name: name if name in output else name.replace("block_sparse_moe", "mlp")
        for name in expected
    }
    assert set(renamed.values()) == output.keys()
    for name, value in expected.items():
        assert output[renamed[name]].tobytes() == value.tobytes(), name
    assert verify(tmp_path / "output", tmp_path / "stacked").sound
    dequantize(tmp_path / "output", tmp_path / "float", log=lambda _: None)
    assert stored(found.source).keys() == stored(tmp_path / "float").keys()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_config_json_alone_says_how_large_the_output_is(case, made, tmp_path):
    found = made(case)
    (tmp_path / "alone").mkdir()
    shutil.copy(found.source / "config.json", tmp_path / "alone")
    alone = quantize(tmp_path / "alone", dry_run=True, **OPTIONS).plan
    whole = quantize(found.source, dry_run=True, **OPTIONS).plan
    known = {planned.name: planned for planned in whole.tensors}
    optional = 0
    for planned in alone.tensors:
        if alone.config.is_prediction(planned.tensor) and planned.name not in known:
            optional += planned.rank_bytes
            continue
        wanted = known[planned.name]
        # transformers has own rules for the dtypes of routers and their biases.
        if planned.tensor.role not in EXACT_ROLES:
            assert planned.specs == wanted.specs
            assert planned.tensor.source_bytes == wanted.tensor.source_bytes
    assert {planned.name for planned in alone.tensors} >= known.keys()
    assert alone.output_bytes - optional == pytest.approx(whole.output_bytes, rel=1e-2)


# --- sources in FP8 and INT4 ----------------------------------------------------------------------


def with_prediction_layer(tensors: Tensors, layer: int) -> Tensors:
    """A layer for multi-token prediction beside the others, made of the one before it."""
    before, rng = f"model.layers.{layer - 1}.", np.random.default_rng(1)
    found = dict(tensors)
    for name, value in tensors.items():
        if name.startswith(before):
            noise = rng.permutation(value.reshape(-1)).reshape(value.shape)
            found[name.replace(before, f"model.layers.{layer}.")] = noise
    hidden = 128
    for name, shape in (
        ("enorm.weight", (hidden,)),
        ("hnorm.weight", (hidden,)),
        ("eh_proj.weight", (hidden, 2 * hidden)),
        ("shared_head.norm.weight", (hidden,)),
    ):
        values = rng.standard_normal(shape, dtype=np.float32)
        found[f"model.layers.{layer}.{name}"] = values.astype(ml_dtypes.bfloat16)
    return found


def test_deepseek_from_fp8_with_its_layer_for_prediction(made, tmp_path):
    case = by_name("deepseek-v3")
    plain = made(case)
    tensors = with_prediction_layer(stored(plain.source), 2)
    exact = {}
    for name in [n for n in tensors if n.endswith("_proj.weight") and "eh_proj" not in n]:
        tensors[name], tensors[name + "_scale_inv"] = fp8(tensors[name].astype(np.float32))
        exact[name] = from_fp8(tensors[name], tensors[name + "_scale_inv"])
    config = json.loads((plain.source / "config.json").read_text())
    write_source(tmp_path / "source", {**config, "quantization_config": FP8_CONFIG}, tensors)
    quantize(tmp_path / "source", tmp_path / "output", **OPTIONS)
    report = verify(tmp_path / "output", tmp_path / "source")
    assert report.sound, report.problems
    output, entry = stored(tmp_path / "output"), entry_of(tmp_path / "output")
    assert set(entry["experts"]) == {"model.layers.1.mlp.experts", "model.layers.2.mlp.experts"}
    assert entry["source_quantization_config"] == FP8_CONFIG
    for name, value in tensors.items():
        if ".experts." not in name:
            assert output[name].dtype == value.dtype
            assert output[name].tobytes() == value.tobytes(), name
    # The same experts from their exact values in float32.
    floats = {n: exact.get(n, v) for n, v in tensors.items() if not n.endswith("_scale_inv")}
    write_source(tmp_path / "float32", config, floats)
    quantize(tmp_path / "float32", tmp_path / "from-float32", **OPTIONS)
    expected = stored(tmp_path / "from-float32")
    packed = [name for name in output if ".experts." in name]
    assert all(output[name].tobytes() == expected[name].tobytes() for name in packed)

    dequantize(tmp_path / "output", tmp_path / "again", log=lambda _: None)
    back = stored(tmp_path / "again")
    assert "model.layers.2.eh_proj.weight" in back
    assert not any(name.endswith("_scale_inv") for name in back)
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())


@pytest.mark.parametrize(
    "missing",
    ["eh_proj.weight", "mlp.experts.3.up_proj.weight", "self_attn.o_proj.weight", "enorm.weight"],
)
def test_a_layer_for_prediction_is_there_as_a_whole(missing, made, tmp_path):
    plain = made(by_name("deepseek-v3"))
    tensors = with_prediction_layer(stored(plain.source), 2)
    del tensors[f"model.layers.2.{missing}"]
    write_source(tmp_path / "source", plain.case.config, tensors)
    with pytest.raises(CcqError, match=f"1 tensor is missing, the first 'model.layers.2.{missing}"):
        quantize(tmp_path / "source", tmp_path / "output", **OPTIONS)
    assert not (tmp_path / "output").exists()


def test_layers_for_prediction_can_be_left_out(made, tmp_path):
    plain = made(by_name("deepseek-v3"))
    tensors = with_prediction_layer(stored(plain.source), 2)
    write_source(tmp_path / "source", plain.case.config, tensors)
    quantize(tmp_path / "source", tmp_path / "output", drop_mtp=True, **OPTIONS)
    assert verify(tmp_path / "output", tmp_path / "source").sound
    expected = stored(plain.output)
    assert {n: v.tobytes() for n, v in stored(tmp_path / "output").items()} == {
        n: v.tobytes() for n, v in expected.items()
    }
    config = json.loads((tmp_path / "output/config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0


def test_kimi_from_int4(made, tmp_path):
    plain = made(by_name("deepseek-v3"))
    tensors, exact = stored(plain.source), {}
    for name in [n for n in tensors if ".experts." in n]:
        packed = int4(tensors[name].astype(np.float32))
        exact[name] = from_int4(packed, tensors.pop(name).shape[1])
        stem = name.removesuffix(".weight")
        tensors |= {f"{stem}.{suffix}": value for suffix, value in packed.items()}
    config = json.loads((plain.source / "config.json").read_text())
    config |= {"model_type": "kimi_k2", "quantization_config": int4_config()}
    write_source(tmp_path / "source", config, tensors)
    quantize(tmp_path / "source", tmp_path / "output", **OPTIONS)
    entry = entry_of(tmp_path / "output")
    assert entry["family"] == "Kimi-K2"
    assert verify(tmp_path / "output", tmp_path / "source").sound
    floats = {**{n: v for n, v in tensors.items() if ".experts." not in n}, **exact}
    config.pop("quantization_config")
    write_source(tmp_path / "float32", config, floats)
    quantize(tmp_path / "float32", tmp_path / "expected", **OPTIONS)
    output, expected = stored(tmp_path / "output"), stored(tmp_path / "expected")
    assert output.keys() == expected.keys()
    assert all(output[name].tobytes() == expected[name].tobytes() for name in output)


# --- what else a source may hold, and what is refused ---------------------------------------------


def test_tensors_that_the_family_does_not_name_are_kept(made, tmp_path):
    plain = made(by_name("qwen3-moe"))
    more = {
        "model.layers.0.self_attn.extra.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "model.counts": np.arange(4, dtype=np.int64),
        "a{b}c": np.ones((2, 2), np.float16),
        "a.number": np.array(2.5, np.float32),
        "a.count": np.array(7, np.int32),
        "nothing": np.zeros((0, 4), np.float32),
        "model.layers.0.self_attn.q_proj.input_scale": np.array(0.5, np.float32),
    }
    source = changed_source(plain, tmp_path / "source", **more)
    quantize(source, dry_run=True, **OPTIONS)
    quantize(source, tmp_path / "output", **OPTIONS)
    assert verify(tmp_path / "output", source).sound
    dequantize(tmp_path / "output", tmp_path / "again", log=lambda _: None)
    for folder in ("output", "again"):
        found = stored(tmp_path / folder)
        for name, value in more.items():
            np.testing.assert_array_equal(found[name], value)
            assert found[name].dtype == value.dtype


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
        (["--target", "fastdeploy", "--family", "generic"], "and no Qwen3MoeForCausalLM; leave"),
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


# --- ERNIE-4.5 in this layout ---------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_ernie_can_be_written_so_from_both_namings(layout, tmp_path):
    source = tmp_path / "source"
    write_checkpoint(source, tiny_config(moe_intermediate_size=128), layout=layout)
    quantize(source, tmp_path / "output", target="huggingface", **OPTIONS)
    report = verify(tmp_path / "output", source)
    assert report.sound, report.problems
    found, original = open_checkpoint(tmp_path / "output"), open_checkpoint(source)
    assert found.naming.name == "pt"
    for name in original.names():
        if found.format_of(name) == "bf16":
            np.testing.assert_array_equal(found.read(name), original.read(name))
            assert found.stored_dtype(name) == original.stored_dtype(name)
        else:
            assert found.config.tensors[name].is_expert
    names = stored(tmp_path / "output")
    assert "model.layers.1.mlp.experts.0.gate_up_proj.quant_weight" in names
    if layout == "pt":
        for name, value in stored(source).items():
            if ".experts." not in name:
                assert names[name].tobytes() == value.tobytes()
    dequantize(tmp_path / "output", tmp_path / "float", naming="pt", log=lambda _: None)
    assert open_checkpoint(tmp_path / "float").names() == original.names()


def test_hugging_faces_layout_has_no_rule_on_which_layers_are_wint4(tmp_path):
    source = tmp_path / "source"
    write_checkpoint(source, tiny_config(moe_intermediate_size=128))
    (tmp_path / "rules.yaml").write_text('- {match: "*.layers.2.mlp.experts.*", format: wint4}\n')
    options = {**OPTIONS, "rules": tmp_path / "rules.yaml"}
    with pytest.raises(CcqError, match="FastDeploy can't load that"):
        quantize(source, tmp_path / "output", **options)
    quantize(source, tmp_path / "output", target="huggingface", **options)
    assert entry_of(tmp_path / "output")["experts"] == {
        "model.layers.1.mlp.experts": "wint2",
        "model.layers.2.mlp.experts": "wint4",
    }
    asked = {"allocate": "2.3bpw", "calibration": "text.jsonl"}
    assert QuantizeOptions(target="huggingface", **asked).allocation_request().plugin_layout
    assert not QuantizeOptions(**asked).allocation_request().plugin_layout


# --- runs that stop -------------------------------------------------------------------------------


def test_a_run_that_goes_on_ends_with_the_same_bytes(made, tmp_path, monkeypatch):
    found = made(by_name("deepseek-v3"))
    options = {**OPTIONS, "max_shard_size": "100kB"}
    quantize(found.source, tmp_path / "expected", **options)
    expected = contents(tmp_path / "expected")
    assert sum(name.endswith(".safetensors") for name in expected) > 5
    for items in (1, 9, 31):
        out = tmp_path / f"output-{items}"
        with monkeypatch.context() as patch:
            stop_after(patch, items)
            with pytest.raises(KeyboardInterrupt):
                quantize(found.source, out, **options)
        assert not out.exists()
        with pytest.raises(CcqError, match=r"--format wint2 then, ccq-2\.5 now"):
            quantize(found.source, out, format="ccq-2.5", **options)
        quantize(found.source, out, **options)
        assert contents(out) == expected


def test_another_target_or_family_is_another_run(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "source", tiny_config(moe_intermediate_size=128))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            quantize(tmp_path / "source", tmp_path / "output", **OPTIONS)
    with pytest.raises(CcqError) as refused:
        quantize(tmp_path / "source", tmp_path / "output", target="huggingface", **OPTIONS)
    said = str(refused.value).replace(str(tmp_path), "")
    assert "not the same: --target fastdeploy then, huggingface now. Repeat" in said
    # What only one target has is no difference of its own.
    for key in ("layout", "wint4", "rules", "family", "null"):
        assert key not in said


def test_a_null_is_the_fault_of_its_own_key(tmp_path):
    config = {**by_name("qwen3-moe").config, "num_experts": None, "num_local_experts": None}
    for gone, named in ((["num_experts"], "num_local_experts"), ([], "num_experts")):
        found = {key: value for key, value in config.items() if key not in gone}
        with pytest.raises(CcqError, match=f" {named}: missing"):
            read_config(found)


def test_drop_mtp_on_a_model_without_such_layers_says_so(made, tmp_path, capsys):
    source = made(by_name("qwen3-moe")).source
    for flags in (["--output", str(tmp_path / "output")], ["--dry-run"]):
        assert main(["--model", str(source), "--preset", "fast", "--drop-mtp", *flags]) == 0
        printed = capsys.readouterr()
        said = "--drop-mtp: the model has no layers for multi-token prediction"
        assert said in printed.out + printed.err
        assert "0 tensors" not in printed.out + printed.err


# --- config.json and tensors of published kinds ---------------------------------------------------


def fp8_source(plain: Made, folder: Path, config: dict[str, Any], more: Tensors) -> Path:
    """The source with its experts in FP8."""
    tensors = stored(plain.source)
    for name in [n for n in tensors if ".experts." in n]:
        tensors[name], tensors[f"{name}_scale_inv"] = fp8(tensors[name].astype(np.float32))
    return write_source(folder, config, tensors | more)


def test_the_entry_may_lie_in_text_config(made, tmp_path):
    plain = made(by_name("qwen3.5-moe-vision"))
    config = json.loads(json.dumps(plain.case.config))
    config["text_config"]["quantization_config"] = FP8_CONFIG
    source = fp8_source(plain, tmp_path / "source", config, {})
    quantize(source, tmp_path / "output", **OPTIONS)
    entry = entry_of(tmp_path / "output")
    assert entry["source_quantization_config"] == FP8_CONFIG
    written = json.loads((tmp_path / "output/config.json").read_text())
    assert "quantization_config" not in written["text_config"]
    assert verify(tmp_path / "output", source).sound
    dequantize(tmp_path / "output", tmp_path / "float", log=lambda _: None)
    again = json.loads((tmp_path / "float/config.json").read_text())
    assert "quantization_config" not in {**again, **again["text_config"]}


@pytest.mark.parametrize("family", [None, "generic"])
def test_scales_of_inputs_are_kept_of_dense_layers_alone(family, made, tmp_path):
    plain = made(by_name("qwen3-moe"))
    name = "model.layers.1.mlp.experts.0.up_proj.input_scale"
    dense = "model.layers.1.self_attn.q_proj.input_scale"
    more = {key: np.ones(1, np.float32) for key in (name, dense)}
    config = {**plain.case.config, "quantization_config": FP8_CONFIG}
    source = fp8_source(plain, tmp_path / "source", config, more)
    quantize(source, tmp_path / "output", family=family, **OPTIONS)
    output = stored(tmp_path / "output")
    assert dense in output
    assert name not in output
    assert verify(tmp_path / "output", source).sound


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
