# SPDX-License-Identifier: Apache-2.0
"""Sources of other families in FP8 and INT4, and with layers for multi-token prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from helpers.family_models import Tensors, by_name, write_source
from helpers.family_runs import OPTIONS, Made, entry_of, stored
from helpers.published import FP8_CONFIG, fp8, from_fp8, from_int4, int4, int4_config
from paddle_ccq.dequantize import dequantize
from paddle_ccq.errors import CcqError
from paddle_ccq.quantize import main, quantize
from paddle_ccq.verify import verify

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
