# SPDX-License-Identifier: Apache-2.0
"""Quantized folders of other families that were damaged or edited afterwards."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.family_models import by_name, write_source
from helpers.family_runs import OPTIONS, Made, stored
from helpers.synthetic import write_tensors
from paddle_ccq.dequantize import dequantize
from paddle_ccq.errors import CcqError
from paddle_ccq.fastdeploy.check import main as fastdeploy_main
from paddle_ccq.quantize import quantize
from paddle_ccq.verify import verify


def broken(found: Made, folder: Path, change: Any) -> list[str]:
    """The problems that verify finds once `change` has been made to a copy of the output."""
    shutil.copytree(found.output, folder)
    tensors = stored(folder)
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "ccq-manifest.json").unlink()
    write_tensors(folder, tensors, 1)
    (folder / "config.json").write_text(json.dumps(config))
    return verify(folder, found.source).problems


PACKED = "model.layers.1.mlp.experts.2.gate_up_proj"


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t, c: t.pop(f"{PACKED}.super_scales"), f"{PACKED}.super_scales: missing"),
        (lambda t, c: t.pop("model.norm.weight"), "model.norm.weight: missing"),
        (
            lambda t, c: t.update({"model.norm.weight": 2 * t["model.norm.weight"]}),
            "model.norm.weight: not the reference's bytes",
        ),
        (
            lambda t, c: t.update({f"{PACKED}.quant_weight": t[f"{PACKED}.quant_weight"][::-1]}),
            "these are other weights",
        ),
        (
            lambda t, c: t.update({f"{PACKED}.code_zp": t[f"{PACKED}.code_zp"] * np.nan}),
            "NaN or infinite",
        ),
        (
            lambda t, c: c["quantization_config"].update(row_order="fastdeploy-2.1"),
            "row_order",
        ),
        (
            lambda t, c: c["quantization_config"]["experts"].update({"model.x": "wint2"}),
            "model.x: the model has no such experts",
        ),
    ],
)
def test_verify_finds_what_is_wrong(change, problem, made, tmp_path):
    problems = broken(made(by_name("qwen3-moe")), tmp_path / "broken", change)
    assert any(problem in found for found in problems), problems


@pytest.mark.parametrize("suffix", ["code_scale", "code_zp"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_codes_of_no_number_are_not_decoded(suffix, value, made, tmp_path):
    found = made(by_name("qwen3-moe"))
    tensors = stored(found.output)
    changed = tensors[f"{PACKED}.{suffix}"].copy()
    changed[3] = value
    tensors[f"{PACKED}.{suffix}"] = changed
    config = json.loads((found.output / "config.json").read_text())
    folder = write_source(tmp_path / "broken", config, tensors)
    problem = rf"{PACKED}\.{suffix}: 1 of 256 values are NaN or infinite; the file is damaged"
    with pytest.raises(CcqError, match=problem):
        dequantize(folder, tmp_path / "float", log=lambda _: None)
    assert not (tmp_path / "float").exists()
    assert any("NaN or infinite" in text for text in verify(folder, found.source).problems)


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3.5-moe", "qwen3.5-moe-vision"])
@pytest.mark.parametrize("family", [None, "generic"])
def test_a_missing_quant_weight_is_told_once(name, family, made, tmp_path):
    found = made(by_name(name))
    quantize(found.source, tmp_path / "output", family=family, **OPTIONS)
    tensors = stored(tmp_path / "output")
    gone = next(n for n in tensors if n.endswith(".experts.2.gate_up_proj.quant_weight"))
    del tensors[gone]
    config = json.loads((tmp_path / "output" / "config.json").read_text())
    folder = write_source(tmp_path / "broken", config, tensors)
    for reference in (None, found.source):
        assert verify(folder, reference).problems == [f"{gone}: missing"]
    with pytest.raises(CcqError, match="is there, but no quant_weight beside it"):
        dequantize(folder, tmp_path / "float", log=lambda _: None)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": 2}, "version: 2 is not known here"),
        ({"format": "wint3"}, "format: 'wint3' is not one of"),
        ({"experts": None}, "experts: must map"),
        ({"experts": {"model.layers.1.mlp.experts": "wint8"}}, "'wint8' is not one of"),
        ({"family": "DeepSeek-V3"}, "family is 'DeepSeek-V3', but by architectures .* Qwen3-MoE"),
        ({"family": 3}, "family is 3, but by architectures and model_type this is Qwen3-MoE"),
        ({"quantization": "wint2"}, "quantization is of FastDeploy's structure and experts of"),
    ],
)
def test_entries_of_config_json_that_are_none(change, problem, made, tmp_path):
    with pytest.raises(CcqError, match=problem):
        broken(
            made(by_name("qwen3-moe")),
            tmp_path / "broken",
            lambda t, c: c["quantization_config"].update(change),
        )


def test_fastdeploys_check_says_whose_layout_it_is(made, capsys):
    flags = [str(made(by_name("qwen3-moe")).output), "--gpu-memory", "80"]
    assert fastdeploy_main(flags) == 2
    assert "in Hugging Face's layout, which FastDeploy does not read" in capsys.readouterr().err


def test_a_packed_checkpoint_is_not_quantized_again(made, tmp_path):
    with pytest.raises(CcqError, match="quantized already"):
        quantize(made(by_name("qwen3-moe")).output, tmp_path / "again", **OPTIONS)
    with pytest.raises(CcqError, match="quant_weight is packed, so the model is quantized already"):
        quantize(made(by_name("qwen3-moe")).output, tmp_path / "again", family="generic", **OPTIONS)


@pytest.mark.parametrize("command", [verify, lambda folder: dequantize(folder, folder / "float")])
def test_what_generic_has_found_must_be_recorded(command, made, tmp_path):
    found = made(by_name("qwen3-moe"))
    shutil.copytree(found.output, tmp_path / "output")
    _change(
        tmp_path / "output",
        lambda content: content["quantization_config"].update(family="generic"),
    )
    with pytest.raises(CcqError, match=r"quantization_config\.found: missing"):
        command(tmp_path / "output")


def _change(folder: Path, change: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "ccq-manifest.json").unlink(missing_ok=True)


def test_rows_are_in_the_order_of_the_entry_without_provenance(made, tmp_path):
    packed = tmp_path / "packed"
    quantize(made(by_name("qwen3-moe")).source, packed, **OPTIONS)
    dequantize(packed, tmp_path / "wanted")
    _change(packed, lambda content: content.pop("paddle_ccq"))
    dequantize(packed, tmp_path / "found")
    found, wanted = (stored(tmp_path / name) for name in ("found", "wanted"))
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    assert not verify(packed, reference=made(by_name("qwen3-moe")).source).problems


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c["paddle_ccq"].update(row_order="fastdeploy-2.1"), "row_order differ"),
        (lambda c: c["quantization_config"].update(row_order="other"), "row_order: 'other'"),
        (lambda c: c["quantization_config"].update(version=2), "version: 2 is not known"),
        (lambda c: c["quantization_config"].update(version=True), "version: true is not known"),
        (lambda c: c["quantization_config"].pop("version"), "version: None is not known"),
        (lambda c: c["quantization_config"].update(family="GLM-4.5"), "family is 'GLM-4.5', but"),
        (lambda c: c["quantization_config"].update(quantization="wint2"), "only one of them can"),
    ],
)
def test_an_entry_that_cannot_be_trusted_is_not_decoded(change, problem, made, tmp_path):
    packed = tmp_path / "packed"
    quantize(made(by_name("qwen3-moe")).source, packed, **OPTIONS)
    _change(packed, change)
    with pytest.raises(CcqError, match=problem):
        dequantize(packed, tmp_path / "found")
    try:
        assert any("row_order" in found for found in verify(packed).problems)
    except CcqError as error:
        assert re.search(problem, str(error))


def test_a_damaged_index_is_named_inside_the_folder(made, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(made(by_name("qwen3-moe")).output, folder)
    index = folder / "model.safetensors.index.json"
    index.write_text("{")
    (folder / "ccq-manifest.json").unlink()
    problems = verify(folder).problems
    assert any(problem.startswith(f"{index.name}: ") for problem in problems)
    assert not any(str(tmp_path) in problem for problem in problems)
