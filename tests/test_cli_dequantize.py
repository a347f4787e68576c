# SPDX-License-Identifier: Apache-2.0
"""`python -m paddle_ccq.dequantize`: same weights in either naming, all or nothing on disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from helpers.synthetic import stored_weights, tiny_config, write_checkpoint, write_tensors
from paddle_ccq import dequantize as module
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.checkpoint.safetensors_io import DTYPES, INDEX_FILE
from paddle_ccq.codec import formats, row_order
from paddle_ccq.dequantize import dequantize, main
from paddle_ccq.errors import CcqError

CONFIG = tiny_config(tie_word_embeddings=False, num_nextn_predict_layers=1)
EXPERT = "ernie.layers.2.mlp.experts.3.down_proj"


def run(*args) -> int:
    return main([str(arg) for arg in args])


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


@pytest.mark.parametrize("source", ["pt", "paddle"])
@pytest.mark.parametrize("target", ["pt", "paddle"])
@pytest.mark.parametrize("size", ["5GB", "300KB"])
def test_writes_the_same_weights_in_either_naming(tmp_path, source, target, size):
    weights = write_checkpoint(tmp_path / "in", CONFIG, source)
    output = tmp_path / "new" / "out"
    assert run(tmp_path / "in", "--output", output, "--naming", target,
               "--max-shard-size", size) == 0  # fmt: skip
    expected = stored_weights(CONFIG, weights, target, "bf16")
    written = tensors_of(output)
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        assert written[name].dtype == value.dtype, name
        np.testing.assert_array_equal(written[name], value)
    index = json.loads((output / INDEX_FILE).read_text())
    assert index["weight_map"].keys() == expected.keys()
    files = set(index["weight_map"].values())
    assert files == {file.name for file in output.glob("*.safetensors")}
    assert (len(files) > 1) == (size == "300KB")
    for file in files:
        with safe_open(output / file, "np") as opened:
            assert opened.metadata() == {"format": {"pt": "pt", "paddle": "np"}[target]}
    reopened = open_checkpoint(output)
    assert reopened.naming.name == target
    for name, weight in weights.items():
        np.testing.assert_array_equal(reopened.read(name), weight)


def test_config_and_other_files(tmp_path):
    config = {
        **CONFIG,
        "quantization_config": {"quantization": "wint2"},
        "paddle_ccq": {"row_order": "plain"},
        "transformers_version": "5.3.0",
        "custom": "中",
    }
    write_checkpoint(tmp_path / "in", config, "pt")
    dequantize(tmp_path / "in", tmp_path / "paddle", log=lambda text: None)
    dequantize(tmp_path / "in", tmp_path / "pt", "pt", log=lambda text: None)
    written = {n: json.loads((tmp_path / n / "config.json").read_text()) for n in ("pt", "paddle")}
    for values in written.values():
        assert not {"quantization_config", "paddle_ccq"} & values.keys()
        assert values["custom"] == "中"
        assert values["num_nextn_predict_layers"] == 1
    assert written["paddle"]["dtype"] == "bfloat16"
    assert not {"torch_dtype", "transformers_version"} & written["paddle"].keys()
    assert written["pt"]["torch_dtype"] == "bfloat16"
    assert "dtype" not in written["pt"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "pt" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_other_floats_are_rounded_to_bfloat16(tmp_path, dtype):
    weights = write_checkpoint(tmp_path / "in", dtype=dtype)
    dequantize(tmp_path / "in", tmp_path / "out", log=lambda text: None)
    for name, value in tensors_of(tmp_path / "out").items():
        router = name.endswith(("gate.weight", "correction_bias"))
        expected = weights[name].astype(np.float32 if router else ml_dtypes.bfloat16)
        assert value.dtype == expected.dtype
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("naming", ["pt", "paddle"])
@pytest.mark.parametrize("format_name", ["wint2", "wint4", "ccq-2t", "ccq-2.5"])
def test_quantized_matrices_are_decoded(tmp_path, naming, format_name):
    folder = tmp_path / "in"
    write_checkpoint(folder, layout="paddle")
    tensors = load_file(folder / "model.safetensors")
    shape = tensors.pop(f"{EXPERT}.weight").shape
    packed = {}
    for suffix, (size, dtype) in formats.tensor_specs(format_name, *shape).items():
        values = np.arange(np.prod(size)).reshape(size) % 100 + 1
        packed[suffix] = values.astype(DTYPES[dtype])
        tensors[f"{EXPERT}.{suffix}"] = packed[suffix]
    write_tensors(folder, tensors)
    dequantize(folder, tmp_path / "out", naming, log=lambda text: None)
    expected = formats.decode(format_name, packed, "bfloat16")
    if format_name == "wint2":
        expected = row_order.unpermute_rows(expected)
    assert (expected.astype(ml_dtypes.bfloat16).astype(np.float32) == expected).all()
    read = open_checkpoint(tmp_path / "out")
    assert not read.is_quantized
    np.testing.assert_array_equal(read.read(f"{EXPERT}.weight"), expected)


# --- refusals ---


def test_existing_output_is_refused(tmp_path, capsys):
    write_checkpoint(tmp_path / "in")
    (tmp_path / "out").mkdir()
    assert run(tmp_path / "in", "--output", tmp_path / "out") == 2
    assert "out: already exists" in capsys.readouterr().err
    assert run(tmp_path / "in", "--output", tmp_path / "in") == 2
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert run(tmp_path / "in", "--output", tmp_path / "link") == 2


@pytest.mark.parametrize(
    ("flag", "value", "problem"),
    [("--max-shard-size", "big", "--max-shard-size: 'big'"), ("--row-order", "x", "--row-order")],
)
def test_wrong_flags_are_named(tmp_path, capsys, flag, value, problem):
    write_checkpoint(tmp_path / "in")
    try:
        code = run(tmp_path / "in", "--output", tmp_path / "out", flag, value)
    except SystemExit as exit_:  # argparse's own refusal
        code = exit_.code
    assert code == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wrong_naming_from_python(tmp_path):
    with pytest.raises(CcqError, match="--naming: 'torch' is not one of pt, paddle"):
        dequantize(tmp_path, tmp_path / "out", "torch")


def test_damaged_input_leaves_nothing(tmp_path, capsys):
    write_checkpoint(tmp_path / "in")
    weights = tmp_path / "in" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert run(tmp_path / "in", "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "model.safetensors: truncated" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_while_writing_leaves_nothing(tmp_path, monkeypatch, failure):
    write_checkpoint(tmp_path / "in")

    def write(writer, name, array):
        raise failure

    monkeypatch.setattr(module.SafetensorsWriter, "write", write)
    assert run(tmp_path / "in", "--output", tmp_path / "out") in (2, 130)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_full_disk_is_seen_before_writing(tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path / "in")
    usage = type(shutil.disk_usage(tmp_path))(total=10, used=10, free=0)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    assert run(tmp_path / "in", "--output", tmp_path / "out") == 2
    assert "the disk has 0.00 MB free" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_left_over_folder_of_a_killed_run_is_replaced(tmp_path):
    write_checkpoint(tmp_path / "in")
    partial = tmp_path / "out.ccq-partial"
    partial.mkdir()
    (partial / "model-00001-of-00009.safetensors").write_bytes(b"x")
    assert run(tmp_path / "in", "--output", tmp_path / "out") == 0
    assert not partial.exists()
    assert "model-00001-of-00009.safetensors" not in {p.name for p in (tmp_path / "out").iterdir()}


def test_unfinished_quantization_is_not_touched(tmp_path, capsys):
    write_checkpoint(tmp_path / "in")
    partial = tmp_path / "out.ccq-partial"
    partial.mkdir()
    (partial / "journal.jsonl").write_text("{}")
    assert run(tmp_path / "in", "--output", tmp_path / "out") == 2
    assert "an unfinished quantization" in capsys.readouterr().err
    assert (partial / "journal.jsonl").exists()


def test_as_a_module(tmp_path):
    write_checkpoint(tmp_path / "in")
    command = [sys.executable, "-m", "paddle_ccq.dequantize", "in", "--output", "out"]
    root = Path(module.__file__).parents[1]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(root)}
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'out'}\n"
    assert "-PT layout" in result.stderr
    again = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(root)}
    )
    assert again.returncode == 2
    assert len(again.stderr.splitlines()) == 1


@pytest.mark.parametrize("place", ["in", "in/deep/er", "link/out"])
def test_the_output_does_not_lie_in_the_model(tmp_path, capsys, place):
    write_checkpoint(tmp_path / "in", CONFIG)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    before = sorted(path.name for path in (tmp_path / "in").iterdir())
    assert run(tmp_path / "in", "--output", tmp_path / place) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: ")
    assert "already exists" in said or "lies in the model's own folder" in said
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == before
