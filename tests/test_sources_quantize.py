# SPDX-License-Identifier: Apache-2.0
"""`quantize` on sources in FP8, INT4 and stacks writes what it writes of the same float values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from helpers.published import FP8_CONFIG, fp8, from_fp8, from_int4, int4, int4_config
from helpers.runs import contents
from helpers.synthetic import tiny_config, write_checkpoint, write_tensors
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.dequantize import dequantize
from paddle_ccq.errors import CcqError
from paddle_ccq.quantize import main, quantize
from paddle_ccq.verify import verify

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
OPTIONS = {"preset": "fast", "quiet": True}
Tensors = dict[str, np.ndarray]


def to_fp8(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Every linear layer in FP8, and the values that these are."""
    stored, exact = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            values, scales = fp8(weight.astype(np.float32))
            stored[name], stored[name + "_scale_inv"] = values, scales
            if ".up_proj." in name:  # a scale of the inputs, as static FP8 has it
                stored[name.replace("weight", "input_scale")] = np.ones(1, np.float32)
            exact[name] = from_fp8(values, scales)
    return stored, exact


def to_int4(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The experts in INT4 groups of 32, and the values that these are."""
    stored, exact = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if ".experts." in name:
            packed = int4(weight.astype(np.float32))
            del stored[name]
            stem = name.removesuffix(".weight")
            stored.update({f"{stem}.{suffix}": value for suffix, value in packed.items()})
            exact[name] = from_int4(packed, weight.shape[1])
    return stored, exact


def to_stacks(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The experts of a layer in two tensors of three dimensions."""
    stored = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in (1, 2):
        base = f"model.layers.{layer}.mlp.experts"
        matrices = [
            [tensors[f"{base}.{expert}.{which}_proj.weight"] for which in ("gate", "up", "down")]
            for expert in range(4)
        ]
        stored[f"{base}.gate_up_proj"] = np.stack([np.vstack(m[:2]) for m in matrices])
        stored[f"{base}.down_proj"] = np.stack([m[2] for m in matrices])
    return stored, tensors


KINDS: dict[str, tuple[Callable, dict | None]] = {
    "fp8": (to_fp8, FP8_CONFIG),
    "int4": (to_int4, int4_config()),
    "stacks": (to_stacks, None),
}


def write(folder: Path, tensors: Tensors, entry: dict | None, shards: int = 1) -> None:
    write_checkpoint(folder, tiny_config())
    (folder / "model.safetensors").unlink()
    write_tensors(folder, tensors, shards)
    if entry is not None:
        path = folder / "config.json"
        values = {**json.loads(path.read_text()), "quantization_config": entry}
        path.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def tensors(tmp_path_factory) -> Tensors:
    folder = tmp_path_factory.mktemp("float")
    write_checkpoint(folder, tiny_config())
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_as_from_the_same_floats(tmp_path, tensors, kind, capsys):
    convert, entry = KINDS[kind]
    stored, exact = convert(tensors)
    write(tmp_path / "source", stored, entry, shards=3)
    write(tmp_path / "float", exact, None)
    assert main(["--model", str(tmp_path / "source"), "--dry-run"]) == 0
    capsys.readouterr()
    for source in ("source", "float"):
        quantize(tmp_path / source, tmp_path / f"{source}-out", **OPTIONS)
    found, wanted = (contents(tmp_path / f"{s}-out") for s in ("source", "float"))
    weights = [name for name in wanted if name.endswith((".safetensors", ".index.json"))]
    assert weights and {n: found[n] for n in weights} == {n: wanted[n] for n in weights}
    config = json.loads((tmp_path / "source-out" / "config.json").read_text())
    assert config["quantization_config"]["quantization"] == "wint2"
    for reference in ("source", "float"):
        result = verify(tmp_path / "source-out", tmp_path / reference)
        assert result.sound and result.matrices, result.problems


@pytest.mark.parametrize("kind", KINDS)
def test_float_copies_hold_the_decoded_values(tmp_path, tensors, kind):
    convert, entry = KINDS[kind]
    stored, exact = convert(tensors)
    write(tmp_path / "source", stored, entry)
    dequantize(tmp_path / "source", tmp_path / "out", naming="pt")
    written = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert written.keys() == exact.keys()
    for name, value in exact.items():
        wanted = value if written[name].dtype == np.float32 else value.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(written[name], wanted, err_msg=name)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_bytes_and_types_of_a_source(tmp_path, tensors):
    stored, _ = to_fp8(tensors)
    write(tmp_path, stored, FP8_CONFIG)
    checkpoint = open_checkpoint(tmp_path)
    name = "ernie.layers.1.mlp.experts.2.up_gate_proj.weight"
    assert not checkpoint.is_quantized and checkpoint.stored_dtype(name) == "F32"
    parts = [EXPERT.replace("up_proj", "gate_proj"), EXPERT]
    names = [n + s for n in parts for s in ("", "_scale_inv")]
    assert checkpoint.stored_names(name) == [*names, EXPERT.replace("weight", "input_scale")]
    assert checkpoint.stored_bytes(name) == 2 * (128 * 128 + 4) + 4
    total = sum(checkpoint.stored_bytes(name) for name in checkpoint.names())
    assert total == sum(value.nbytes for value in stored.values())


# --- what is not right ---


def refused(folder: Path, out: Path, problem: str, **options) -> None:
    with pytest.raises(CcqError, match=problem) as error:
        quantize(folder, out, **OPTIONS, **options)
    assert "\n" not in str(error.value) and not out.exists()


def test_a_nan_code_names_tensor_and_block(tmp_path, tensors):
    stored, exact = to_fp8(tensors)
    stored[EXPERT].view(np.uint8)[7, 9] = 0x7F
    write(tmp_path / "source", stored, FP8_CONFIG)
    place = re.escape(f"block [0, 0] (rows 0 to 127, columns 0 to 127) of {EXPERT}")
    refused(tmp_path / "source", tmp_path / "out", f"holds 1 values.*NaN.*, the first in {place}")
    quantize(tmp_path / "source", tmp_path / "out", **OPTIONS, allow_nonfinite=True, restart=True)
    exact[EXPERT] = exact[EXPERT].copy()
    exact[EXPERT][7, 9] = 0
    write(tmp_path / "float", exact, None)
    quantize(tmp_path / "float", tmp_path / "wanted", **OPTIONS)
    found, wanted = (contents(tmp_path / folder) for folder in ("out", "wanted"))
    (shard,) = (name for name in wanted if name.endswith(".safetensors"))
    assert found[shard] == wanted[shard]


@pytest.mark.parametrize("scale", [np.nan, 0, -1])
def test_a_wrong_scale_stops_the_run_even_where_nonfinite_values_may_pass(tmp_path, tensors, scale):
    stored, _ = to_fp8(tensors)
    stored[EXPERT + "_scale_inv"][0, 0] = scale
    write(tmp_path / "source", stored, FP8_CONFIG)
    for allow in (False, True):
        problem = re.escape(f"{EXPERT}_scale_inv: the scale {scale} of block [0, 0]")
        out = tmp_path / f"out-{allow}"
        refused(tmp_path / "source", out, problem, allow_nonfinite=allow)


def test_a_missing_scale_stops_before_any_work(tmp_path, tensors):
    stored, _ = to_fp8(tensors)
    del stored[EXPERT + "_scale_inv"]
    write(tmp_path / "source", stored, FP8_CONFIG)
    refused(tmp_path / "source", tmp_path / "out", f"its scales {EXPERT}_scale_inv are missing")


def test_a_stack_that_is_missing(tmp_path, tensors):
    stored, _ = to_stacks(tensors)
    del stored["model.layers.2.mlp.experts.down_proj"]
    write(tmp_path / "source", stored, None)
    refused(tmp_path / "source", tmp_path / "out", "4 tensors are missing, the first .*down_proj")


def test_experts_stored_twice_are_refused(tmp_path, tensors):
    stored, _ = to_stacks(tensors)
    mixed = "the files of two checkpoints are mixed"
    write(tmp_path / "source", {**stored, **tensors}, None)
    refused(tmp_path / "source", tmp_path / "out", mixed)
    # A stack of which a single matrix is there besides, with other values.
    write(tmp_path / "one", {**stored, EXPERT: -tensors[EXPERT]}, None)
    refused(tmp_path / "one", tmp_path / "out", mixed)
    packed = {EXPERT.replace("weight", f"{k}"): v for k, v in int4(tensors[EXPERT]).items()}
    write(tmp_path / "packed", {**tensors, **packed}, int4_config())
    refused(tmp_path / "packed", tmp_path / "out", mixed)


KEPT = "model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize("scale", [np.nan, np.inf, 0, -1])
def test_a_wrong_scale_of_what_is_kept_stops_the_run_too(tmp_path, tensors, scale):
    stored, _ = to_fp8(tensors)
    stored[KEPT + "_scale_inv"][0, 0] = scale
    write(tmp_path / "source", stored, FP8_CONFIG)
    for allow in (False, True):
        problem = re.escape(f"{KEPT}_scale_inv: the scale {scale} of block [0, 0]")
        out = tmp_path / f"out-{allow}"
        options = {"target": "huggingface", "allow_nonfinite": allow}
        refused(tmp_path / "source", out, problem, **options)


def test_a_nan_code_of_what_is_kept(tmp_path, tensors):
    stored, _ = to_fp8(tensors)
    stored[KEPT].view(np.uint8)[7, 9] = 0x7F
    write(tmp_path / "source", stored, FP8_CONFIG)
    place = re.escape(f"block [0, 0] (rows 0 to 127, columns 0 to 127) of {KEPT}")
    options = {"target": "huggingface"}
    refused(tmp_path / "source", tmp_path / "out", f"{KEPT} holds 1 values.*{place}", **options)
    options |= {"allow_nonfinite": True, "restart": True}
    quantize(tmp_path / "source", tmp_path / "out", **OPTIONS, **options)
    stored[KEPT].view(np.uint8)[7, 9] = 0
    kept = open_checkpoint(tmp_path / "out").tensors.read(KEPT)
    assert np.array_equal(kept.view(np.uint8), stored[KEPT].view(np.uint8))
    assert not verify(tmp_path / "out").problems
    assert not verify(tmp_path / "out", reference=tmp_path / "source").problems


@pytest.mark.parametrize("layout", ["pt", "paddle"])
def test_a_nan_of_a_kept_tensor_under_another_name(tmp_path, layout):
    write_checkpoint(tmp_path / "source", tiny_config(), layout)
    path = tmp_path / "source" / "model.safetensors"
    stored = load_file(path)
    name = next(name for name in stored if name.endswith(".norm.weight"))
    stored[name][3] = np.nan
    write_tensors(tmp_path / "source", stored)
    options = {"target": "huggingface"}
    refused(tmp_path / "source", tmp_path / "out", "norm.weight holds 1 values", **options)


def test_a_nan_scale_of_inputs_that_is_kept(tmp_path, tensors):
    stored, _ = to_fp8(tensors)
    name = KEPT.replace("weight", "input_scale")
    stored[name] = np.full(1, np.nan, np.float32)
    write(tmp_path / "source", stored, FP8_CONFIG)
    options = {"target": "huggingface"}
    refused(tmp_path / "source", tmp_path / "out", f"{name} holds 1 values", **options)


@pytest.mark.parametrize("method", ["gptq", "awq", "mxfp4"])
def test_other_methods_are_refused_by_name(tmp_path, tensors, method, capsys):
    write(tmp_path / "source", tensors, {"quant_method": method})
    refused(tmp_path / "source", tmp_path / "out", f"quant_method '{method}'")
    assert main(["--model", str(tmp_path / "source"), "--dry-run"]) == 2
    assert f"quant_method '{method}'" in capsys.readouterr().err
