# SPDX-License-Identifier: Apache-2.0
"""`--family generic`: models of no known architecture, whose experts have the usual names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.family_models import (
    Tensors,
    by_name,
    stacked_tensors,
    write_source,
)
from helpers.family_runs import OPTIONS, Made, entry_of, stored
from helpers.published import FP8_CONFIG, fp8, from_int4, int4
from paddle_ccq.dequantize import dequantize
from paddle_ccq.errors import CcqError
from paddle_ccq.quantize import quantize
from paddle_ccq.verify import verify


def unknown(found: Made, folder: Path, change: Any = None) -> Path:
    """The model under an architecture that nobody knows."""
    tensors = stored(found.source)
    config = json.loads((found.source / "config.json").read_text())
    config |= {"architectures": ["UnheardOfForCausalLM"], "model_type": "unheard_of"}
    if change is not None:
        change(tensors)
    write_source(folder, config, tensors)
    return folder


@pytest.mark.parametrize("name", ["qwen3-moe", "minimax-m2", "qwen3.5-moe-vision"])
@pytest.mark.parametrize("stacked", [False, True])
def test_generic_packs_what_the_family_would_pack(name, stacked, made, tmp_path, capsys):
    found = made(by_name(name))
    if stacked:
        stacks = stacked_tensors(stored(found.source))
        source = write_source(tmp_path / "stacked", found.case.config, stacks)
        found = Made(found.case, source, found.output)
    source = unknown(found, tmp_path / "source")
    with pytest.raises(CcqError, match=r"'UnheardOfForCausalLM' is not supported; .*--family gen"):
        quantize(source, tmp_path / "output", **OPTIONS)
    quantize(source, tmp_path / "output", family="generic", preset="fast")
    said = capsys.readouterr().err
    assert "found and quantized:" in said
    assert "experts.0-3.gate_up_proj" in said
    expected, output = stored(found.output), stored(tmp_path / "output")
    if name == "minimax-m2" and stacked:
        expected = {n.replace("block_sparse_moe", "mlp"): v for n, v in expected.items()}
    assert output.keys() == expected.keys()
    assert all(output[name].tobytes() == expected[name].tobytes() for name in output)
    assert entry_of(tmp_path / "output")["family"] == "generic"
    report = verify(tmp_path / "output", source)
    assert report.sound, report.problems
    assert report.matrices
    dequantize(tmp_path / "output", tmp_path / "float", log=lambda _: None)
    dequantize(found.output, tmp_path / "expected", log=lambda _: None)
    again, wanted = stored(tmp_path / "float"), stored(tmp_path / "expected")
    if not (name == "minimax-m2" and stacked):
        assert again.keys() == wanted.keys()
        assert all(again[name].tobytes() == wanted[name].tobytes() for name in again)


def test_generic_from_int4_and_fp8(made, tmp_path):
    plain = made(by_name("deepseek-v3"))
    tensors, exact = stored(plain.source), {}
    for index, name in enumerate([n for n in tensors if ".experts." in n]):
        weight = tensors.pop(name)
        stem = name.removesuffix(".weight")
        if index % 2:
            tensors[name], tensors[f"{stem}.weight_scale_inv"] = fp8(weight.astype(np.float32))
        else:
            packed = int4(weight.astype(np.float32))
            tensors |= {f"{stem}.{suffix}": value for suffix, value in packed.items()}
            exact[name] = from_int4(packed, weight.shape[1])
    config = json.loads((plain.source / "config.json").read_text())
    config |= {"architectures": ["X"], "quantization_config": FP8_CONFIG}
    write_source(tmp_path / "mixed", config, tensors)
    # INT4 of which config.json says nothing is refused by name.
    with pytest.raises(CcqError, match="weight_packed is stored as INT4, of which"):
        quantize(tmp_path / "mixed", tmp_path / "output", family="generic", **OPTIONS)


E0 = "model.layers.1.mlp.experts.0."


def _rename(old: str, new: str) -> Any:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if old in n]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_rename(".experts.", ".specialists."), "no stored tensor is named like a routed expert"),
        (_rename("up_proj", "upper"), "experts.0 has down_proj, gate_proj, upper; known are"),
        (lambda t: t.pop(E0 + "down_proj.weight"), "experts.0 has gate_proj, up_proj; known"),
        (_rename(".experts.2.", ".experts.7."), "experts.2 is not like the others: None"),
        (
            lambda t: t.update({E0 + "gate_proj.bias": np.zeros(128, np.float32)}),
            "'model.layers.1.mlp.experts.0.gate_proj.bias' lies in a module of experts",
        ),
        (
            lambda t: t.update({E0.replace(".0.", ".x.") + "up_proj.weight": np.zeros((2, 2))}),
            "'model.layers.1.mlp.experts.x.up_proj.weight' lies in a module of experts",
        ),
        (
            lambda t: t.update({E0.replace("0.", "gate_up_proj_bias"): np.zeros((4, 256))}),
            "'model.layers.1.mlp.experts.gate_up_proj_bias' lies in a module of experts",
        ),
        (
            lambda t: t.update({E0.replace(".0.", ".1.") + "up_proj.weight": np.zeros((2, 2))}),
            "experts.1 is not like the others",
        ),
        (
            lambda t: (
                t.update({"a.experts.gate_up_proj": np.zeros((2, 128, 256), np.float32)}),
                t.update({"a.experts.down_proj": np.zeros((2, 128, 128), np.float32)}),
            ),
            r"a.experts: gate_up_proj \[2, 128, 256\] and down_proj \[2, 128, 128\] are not",
        ),
    ],
)
def test_generic_guesses_nothing(change, problem, made, tmp_path):
    source = unknown(made(by_name("qwen3-moe")), tmp_path / "source", change)
    with pytest.raises(CcqError, match=problem):
        quantize(source, tmp_path / "output", family="generic", **OPTIONS)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("architectures", [None, []])
def test_generic_without_an_architecture(architectures, made, tmp_path):
    source = unknown(made(by_name("qwen3-moe")), tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"architectures": architectures}
    (source / "config.json").write_text(json.dumps(config))
    quantize(source, tmp_path / "output", family="generic", **OPTIONS)
    assert not verify(tmp_path / "output", reference=source).problems


def test_generic_needs_the_weights(made, tmp_path):
    (tmp_path / "alone").mkdir()
    shutil.copy(made(by_name("qwen3-moe")).source / "config.json", tmp_path / "alone")
    with pytest.raises(CcqError, match=r"neither model\.safetensors nor"):
        quantize(tmp_path / "alone", dry_run=True, family="generic", **OPTIONS)
    with pytest.raises(CcqError, match="--family x: not one of generic"):
        quantize(tmp_path / "alone", dry_run=True, family="x", **OPTIONS)


def test_generic_is_not_written_for_fastdeploy(tmp_path: Path) -> None:
    """Said of the flags: the architecture may well be one that FastDeploy serves."""
    from helpers.synthetic import write_checkpoint

    write_checkpoint(tmp_path / "m")
    with pytest.raises(CcqError, match="--target fastdeploy: --family generic is written in"):
        quantize(tmp_path / "m", tmp_path / "out", family="generic", target="fastdeploy")
