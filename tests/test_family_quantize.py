# SPDX-License-Identifier: Apache-2.0
"""Models of other families: what of the source their quantized copies keep, and how."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from helpers.family_models import CASES, by_name, stacked_tensors, write_source
from helpers.family_runs import OPTIONS, changed_source, entry_of, stored
from helpers.runs import contents, stop_after
from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.codec import formats
from paddle_ccq.dequantize import dequantize
from paddle_ccq.errors import CcqError
from paddle_ccq.families.tensor import EXACT_ROLES
from paddle_ccq.quantize import QuantizeOptions, quantize
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
