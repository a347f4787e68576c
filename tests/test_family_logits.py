# SPDX-License-Identifier: Apache-2.0
"""Families whose dequantized copies transformers would compute something else from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.family_models import CASES, Case, Tensors, by_name, random_model, save, write_source
from helpers.published import FP8_CONFIG, fp8, from_fp8
from paddle_ccq.checkpoint.safetensors_io import TensorFolder
from paddle_ccq.codec import formats
from paddle_ccq.dequantize import dequantize
from paddle_ccq.quantize import quantize
from paddle_ccq.verify import verify

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

OPTIONS = {"preset": "fast", "quiet": True}
TOKENS = torch.arange(17).reshape(1, 17) * 5 % 96
# Where transformers' classes hold what another module name stands for on disk.
_MODULES = {"block_sparse_moe": "mlp"}


def stored(folder: Path) -> Tensors:
    """All tensors of a folder."""
    tensors = TensorFolder(folder)
    return {name: tensors.read(name) for name in tensors.names()}


def entry_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def decoded(tensors: Tensors, module: str, expert: int, projection: str, format: str) -> np.ndarray:
    """An expert's matrix [out, in] from its packed tensors, as bfloat16 holds it."""
    stem = f"{module}.{expert}.{projection}."
    parts = {n.removeprefix(stem): v for n, v in tensors.items() if n.startswith(stem)}
    return formats.decode(format, parts, "bfloat16", "plain").T


def with_decoded_experts(model: Any, folder: Path) -> None:
    """Put the folder's experts into the model, by names and shapes stated here once more."""
    tensors, parameters = stored(folder), dict(model.named_parameters())
    for module, format in entry_of(folder)["experts"].items():
        own = module
        for disk, python in _MODULES.items():
            own = own.replace(disk, python)
        for projection in ("gate_up_proj", "down_proj"):
            target = parameters[f"{own}.{projection}"]
            with torch.no_grad():
                for expert in range(4):
                    values = decoded(tensors, module, expert, projection, format)
                    target[expert] = torch.from_numpy(np.ascontiguousarray(values))


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float()


def loaded(case: Case, folder: Path) -> Any:
    """The folder as transformers reads it, which must find every tensor that it wants."""
    auto = getattr(transformers, case.auto)
    model, info = auto.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_dequantized_the_logits_are_those_of_the_decoded_weights(case, stacked, tmp_path):
    model = random_model(case)
    save(model, tmp_path / "source", stacked=stacked)
    quantize(tmp_path / "source", tmp_path / "output", **OPTIONS)
    report = verify(tmp_path / "output", tmp_path / "source")
    assert report.sound, report.problems
    assert len(report.matrices) == 2 * 4 * len(entry_of(tmp_path / "output")["experts"])
    assert 0.05 < np.mean([m["rel_mse"] for m in report.matrices]) < 0.2
    dequantize(tmp_path / "output", tmp_path / "float", log=lambda _: None)
    before = logits(model)
    with_decoded_experts(model, tmp_path / "output")
    expected = logits(model)
    assert not torch.equal(expected, before)
    assert torch.equal(logits(loaded(case, tmp_path / "float")), expected)


@pytest.mark.parametrize("format", ["ccq-2.5", "ccq-2.75"])
def test_other_formats_and_layers_in_wint4(format, tmp_path):
    case = by_name("minimax-m2")
    model = random_model(case)
    save(model, tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "output", format=format, wint4_end_layer=0, **OPTIONS)
    assert entry_of(tmp_path / "output")["experts"] == {
        "model.layers.0.block_sparse_moe.experts": "wint4",
        "model.layers.1.block_sparse_moe.experts": format,
    }
    assert verify(tmp_path / "output", tmp_path / "source").sound
    dequantize(tmp_path / "output", tmp_path / "float", log=lambda _: None)
    with_decoded_experts(model, tmp_path / "output")
    assert torch.equal(logits(loaded(case, tmp_path / "float")), logits(model))


def test_dense_layers_in_fp8_have_their_scaled_values(tmp_path):
    case = by_name("deepseek-v3")
    model = random_model(case)
    save(model, tmp_path / "float")
    tensors, exact = stored(tmp_path / "float"), {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        tensors[name], tensors[name + "_scale_inv"] = fp8(tensors[name].astype(np.float32))
        exact[name] = from_fp8(tensors[name], tensors[name + "_scale_inv"])
    config = json.loads((tmp_path / "float/config.json").read_text())
    config["quantization_config"] = FP8_CONFIG
    write_source(tmp_path / "source", config, tensors)
    quantize(tmp_path / "source", tmp_path / "output", **OPTIONS)
    dequantize(tmp_path / "output", tmp_path / "again", log=lambda _: None)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in exact.keys() & parameters.keys():
            parameters[name].copy_(torch.from_numpy(exact[name]))
    with_decoded_experts(model, tmp_path / "output")
    assert torch.equal(logits(loaded(case, tmp_path / "again")), logits(model))
