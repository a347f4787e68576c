# SPDX-License-Identifier: Apache-2.0
"""Values that bfloat16 cannot hold: refused by name, or set to 0 everywhere alike."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers.synthetic import random_weights, stored_weights, tiny_config, write_checkpoint
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.checkpoint.values import count_nonfinite, difference_energy, energy, finite
from paddle_ccq.dequantize import dequantize
from paddle_ccq.errors import CcqError
from paddle_ccq.quantize import quantize
from paddle_ccq.verify import verify

CONFIG = tiny_config(num_hidden_layers=2, moe_num_experts=2, tie_word_embeddings=False)
OPTIONS = {"preset": "fast", "quiet": True}
BEYOND = 3.4e38  # a float32, but more than bfloat16's largest value, 3.3895e38
KEPT = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.1.input_layernorm.weight",
    "lm_head.weight",
)
PACKED = (
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.mlp.shared_experts.down_proj.weight",
    "model.layers.1.mlp.experts.1.up_proj.weight",
)
ROUTER = (
    "model.layers.1.mlp.gate.weight",
    "model.layers.1.mlp.moe_statics.e_score_correction_bias",
)


def with_value(folder: Path, name: str, value: float, dtype: str = "f32") -> None:
    tensor = stored_weights(CONFIG, random_weights(CONFIG), "pt", dtype)[name]
    tensor.reshape(-1)[5 % tensor.size] = value
    write_checkpoint(folder, CONFIG, dtype=dtype, extra={name: tensor})


def short(name: str) -> str:
    """The part of a name that all layouts share."""
    part = name.removesuffix(".weight").rpartition(".")[2]
    return {"k_proj": "qkv_proj", "up_proj": "up_gate_proj"}.get(part, part)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", [*KEPT, *PACKED])
def test_overflow_is_refused_with_tensor_and_value(tmp_path, name, sign):
    with_value(tmp_path / "m", name, sign * BEYOND)
    with pytest.raises(CcqError, match=r"1 values beyond bfloat16's range, up to 3\.4e\+38") as e:
        quantize(tmp_path / "m", tmp_path / "out", **OPTIONS)
    assert short(name) in str(e.value)
    with pytest.raises(CcqError, match=r"1 values beyond bfloat16's range, up to 3\.4e\+38") as e:
        dequantize(tmp_path / "m", tmp_path / "plain", log=lambda text: None)
    assert short(name) in str(e.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "plain").exists()


@pytest.mark.parametrize("name", ROUTER)
def test_float32_tensors_hold_such_values(tmp_path, name):
    with_value(tmp_path / "m", name, BEYOND)
    quantize(tmp_path / "m", tmp_path / "out", **OPTIONS)
    result = verify(tmp_path / "out", tmp_path / "m")
    assert result.sound, result.problems
    dequantize(tmp_path / "m", tmp_path / "plain", log=lambda text: None)
    canonical = name.replace("model.", "ernie.")
    assert np.abs(open_checkpoint(tmp_path / "plain").read(canonical)).max() == np.float32(BEYOND)


def test_the_largest_values_are_kept(tmp_path):
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    with_value(tmp_path / "m", KEPT[0], largest)
    quantize(tmp_path / "m", tmp_path / "out", **OPTIONS)
    assert verify(tmp_path / "out", tmp_path / "m").sound


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("value", [3.3e38, 1e30, 1e20])
@pytest.mark.parametrize("wint4", [True, False])
def test_huge_values_of_packed_matrices(tmp_path, name, value, wint4):
    """Either refused by name, or stored with the error that verify finds: nothing silent."""
    with_value(tmp_path / "m", name, value)
    options = {**OPTIONS, "wint4_end_layer": 1 if wint4 else -1}
    try:
        result = quantize(tmp_path / "m", tmp_path / "out", **options)
    except CcqError as error:
        assert short(name) in str(error) and "the file is damaged" in str(error)
        assert not (tmp_path / "out").exists()
        return
    recorded = {r["name"]: r["stats"]["rel_mse"] for r in result.records if "rel_mse" in r["stats"]}
    found = {m["name"]: m["rel_mse"] for m in verify(tmp_path / "out", tmp_path / "m").matrices}
    assert found == pytest.approx(recorded, rel=1e-3)
    assert all(np.isfinite(error) for error in found.values())
    assert verify(tmp_path / "out", tmp_path / "m").sound


EXPERT = "model.layers.1.mlp.experts.1.down_proj.weight"


@pytest.mark.parametrize("value", [1e3, -1e6, 1e20])
@pytest.mark.parametrize(
    "flags",
    [
        *({}, {"preset": "best"}, {"encoder": "paper"}),
        *({"format": "ccq-2t"}, {"format": "ccq-2.5"}, {"format": "ccq-2.75"}),
        {"tensor_parallel_size": 2},
    ],
)
def test_a_value_that_hides_all_others_is_refused_before_verify_would(tmp_path, value, flags):
    if "tensor_parallel_size" in flags:
        config = {**CONFIG, "moe_intermediate_size": 256}
        weights = random_weights(config)
        tensor = stored_weights(config, weights, "pt", "f32")[EXPERT]
        tensor[3, 5] = value
        write_checkpoint(tmp_path / "m", config, dtype="f32", extra={EXPERT: tensor})
    else:
        with_value(tmp_path / "m", EXPERT, value)
    try:
        quantize(tmp_path / "m", tmp_path / "out", **{**OPTIONS, **flags})
    except CcqError as error:
        said = str(error)
        assert "experts.1.down_proj.weight cannot be stored as" in said and "rel-MSE" in said
        assert f"its largest value, {abs(value):.7g}," in said and "--wint4-end-layer" in said
        assert not (tmp_path / "out").exists()
        return
    assert flags == {"encoder": "paper"}  # which keeps a single value better, and all others worse
    assert verify(tmp_path / "out", tmp_path / "m").sound


@pytest.mark.parametrize("wint4", [1, -1])
def test_the_remedy_for_a_large_value_works(tmp_path, wint4):
    """One that is large but not all there is needs none."""
    with_value(tmp_path / "m", EXPERT, 1e3 if wint4 == 1 else 5.0)
    quantize(tmp_path / "m", tmp_path / "out", **OPTIONS, wint4_end_layer=wint4)
    assert verify(tmp_path / "out", tmp_path / "m").sound


@pytest.mark.parametrize("scale", [1e-15, 1e-25, 1e-30, 1e-37, 1e-45, 0.0])
@pytest.mark.parametrize("format", ["wint2", "ccq-2t", "ccq-2.75", "wint4"])
def test_an_expert_that_vanished_is_sound(tmp_path, scale, format):
    """Zeros may stand for it, and nothing else."""
    tensor = stored_weights(CONFIG, random_weights(CONFIG), "pt", "f32")[EXPERT]
    write_checkpoint(
        tmp_path / "m", CONFIG, dtype="f32", extra={EXPERT: tensor * np.float32(scale)}
    )
    options = {"wint4_end_layer": 1} if format == "wint4" else {"format": format}
    quantize(tmp_path / "m", tmp_path / "out", **OPTIONS, **options)
    result = verify(tmp_path / "out", tmp_path / "m")
    assert result.sound, result.problems
    write_checkpoint(tmp_path / "other", CONFIG, dtype="f32")
    quantize(tmp_path / "other", tmp_path / "full", **OPTIONS, **options)
    [problem] = verify(tmp_path / "full", tmp_path / "m").problems
    assert "experts.1.down_proj.weight: rel-MSE" in problem


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, BEYOND])
@pytest.mark.parametrize("name", [KEPT[0], PACKED[0], PACKED[2], ROUTER[0], ROUTER[1]])
def test_allowed_values_are_0_for_verify_as_well(tmp_path, name, value, dtype):
    if value == BEYOND and (dtype != "f32" or name in ROUTER):
        pytest.skip("not a value of this type, or one that is stored")
    with_value(tmp_path / "m", name, value, dtype)
    quantize(tmp_path / "m", tmp_path / "out", allow_nonfinite=True, **OPTIONS)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "1 weights of the source were NaN, infinite or beyond" in card
    result = verify(tmp_path / "out", tmp_path / "m")
    assert result.sound, result.problems
    (note,) = [m for m in result.messages if "values of the reference" in m]
    assert short(name) in note and "1 values" in note and "--allow-nonfinite" in note
    assert all(np.isfinite(m["rel_mse"]) for m in result.matrices)


def test_another_value_than_0_is_still_found(tmp_path):
    with_value(tmp_path / "m", KEPT[1], np.nan)
    quantize(tmp_path / "m", tmp_path / "out", allow_nonfinite=True, **OPTIONS)
    file = next((tmp_path / "out").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["ernie.norm.weight"][5] = 1
    save_file(tensors, file, metadata={"format": "np"})
    (tmp_path / "out" / "ccq-manifest.json").unlink()
    assert verify(tmp_path / "out", tmp_path / "m").problems == [
        "ernie.norm.weight: not the reference's values"
    ]


def test_dequantize_says_what_it_copies_and_refuses_damage(tmp_path):
    with_value(tmp_path / "m", KEPT[1], np.nan)
    said: list[str] = []
    dequantize(tmp_path / "m", tmp_path / "plain", log=said.append)
    assert "ernie.norm.weight: 1 values are NaN or infinite, as in the source" in said
    write_checkpoint(tmp_path / "good", CONFIG)
    quantize(tmp_path / "good", tmp_path / "out", **OPTIONS)
    file = next((tmp_path / "out").glob("*.safetensors"))
    tensors = load_file(file)
    name = "ernie.layers.1.mlp.experts.0.down_proj"
    tensors[f"{name}.super_scales"][0] = np.inf
    save_file(tensors, file, metadata={"format": "np"})
    with pytest.raises(CcqError, match=rf"{name}.*decode to NaN or infinity"):
        dequantize(tmp_path / "out", tmp_path / "broken", log=said.append)
    assert not (tmp_path / "broken").exists()


def test_what_counts_as_beyond():
    """By the conversion itself, around the limit and at every exponent."""
    limit = np.array([0x7F7F7FFF, 0x7F7F8000, 0x7F7F8001, 0x7F7FFFFF], np.uint32)
    values = np.concatenate([limit, limit | 0x80000000]).view(np.float32)
    values = np.concatenate([values, 2.0 ** np.arange(-140, 128, dtype=np.float32)])
    values = np.concatenate([values, np.float32([np.nan, np.inf, -np.inf, 0, -0.0])])
    with np.errstate(over="ignore"):
        expected = ~np.isfinite(values.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert count_nonfinite(values, "BF16") == expected.sum() == 9
    assert count_nonfinite(values) == 3
    clean, bad = finite(values, "BF16")
    assert bad == 9 and np.array_equal(clean, np.where(expected, 0, values))
    assert finite(np.float16([np.inf, np.nan, 65504]), "BF16")[1] == 2


def test_sums_of_large_values():
    a = np.full((2, 3), 3e38, np.float32)
    assert energy(a) == pytest.approx(6 * 9e76, rel=1e-6)
    assert difference_energy(a, -a) == pytest.approx(6 * 36e76, rel=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("format", ["wint2", "ccq-2t", "ccq-2.75"])
def test_values_too_large_for_the_search_are_one_line(tmp_path, format):
    """The error alone: sums that overflow on the way to it are no warnings of NumPy's."""
    name = "model.layers.1.mlp.experts.1.down_proj.weight"
    tensor = stored_weights(CONFIG, random_weights(CONFIG), "pt", "bf16")[name]
    tensor = (np.sign(tensor.astype(np.float32)) * 3.3e38).astype(tensor.dtype)
    write_checkpoint(tmp_path / "m", CONFIG, extra={name: tensor})
    with pytest.raises(CcqError, match=f"experts.1.down_proj.weight cannot be stored as {format}"):
        quantize(tmp_path / "m", tmp_path / "out", format=format, **OPTIONS)
    assert not (tmp_path / "out").exists()
