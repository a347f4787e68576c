# SPDX-License-Identifier: Apache-2.0
"""Checkpoints read the same in every layout, and refuse to open when something is not right."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from helpers.synthetic import stored_weights, tiny_config, write_checkpoint, write_tensors
from paddle_ccq.checkpoint.reader import PROVENANCE_KEY, open_checkpoint
from paddle_ccq.checkpoint.safetensors_io import DTYPES
from paddle_ccq.codec import formats, row_order
from paddle_ccq.errors import CcqError

UNTIED = {"tie_word_embeddings": False}
EXPERT = "ernie.layers.1.mlp.experts.0.up_gate_proj.weight"
DENSE = "ernie.layers.0.self_attn.qkv_proj.weight"
QUANTIZED_FORMATS = [name for name in formats.FORMATS if name != "bf16"]


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def edit_tensors(folder, changes: dict) -> None:
    """Replace, add, or (with None) remove on-disk tensors of a single-file checkpoint."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    write_tensors(folder, {n: t for n, t in tensors.items() if t is not None})


def random_packed(format_name: str, k: int, n: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tensors = {}
    for suffix, (shape, dtype) in formats.tensor_specs(format_name, k, n).items():
        if dtype in ("BF16", "F32"):
            tensors[suffix] = (rng.random(shape) + 0.5).astype(DTYPES[dtype])
        else:
            low = -100 if dtype.startswith("I") else 0
            tensors[suffix] = rng.integers(low, 100, shape).astype(DTYPES[dtype])
    return tensors


def quantize_in_place(folder, name: str, format_name: str) -> dict[str, np.ndarray]:
    """Replace a matrix of a -Paddle checkpoint by random packed tensors."""
    shape = load_file(folder / "model.safetensors")[name].shape
    packed = random_packed(format_name, *shape)
    prefix = name.removesuffix(".weight")
    changes = {f"{prefix}.{suffix}": value for suffix, value in packed.items()}
    edit_tensors(folder, {name: None, **changes})
    return packed


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize(
    "overrides",
    [
        UNTIED,
        {"num_nextn_predict_layers": 1, "moe_num_shared_experts": 0},
        {"moe_num_experts": 0, **UNTIED},
    ],
)
def test_both_layouts_read_the_same(tmp_path, overrides, dtype):
    config = tiny_config(**overrides)
    weights = write_checkpoint(tmp_path / "pt", config, "pt", dtype)
    write_checkpoint(tmp_path / "paddle", config, "paddle", dtype, shards=3)
    opened = {layout: open_checkpoint(tmp_path / layout) for layout in ("pt", "paddle")}
    for layout, checkpoint in opened.items():
        assert checkpoint.naming.name == layout
        assert not checkpoint.is_quantized
        assert checkpoint.row_order is None
        assert checkpoint.names() == list(weights)
        for name, weight in weights.items():
            read = checkpoint.read(name)
            assert read.dtype == np.float32
            np.testing.assert_array_equal(read, weight)
            assert checkpoint.shape(name) == weight.shape
            assert checkpoint.format_of(name) == "bf16"
            stored = checkpoint.read_stored(name)
            assert stored.dtype == DTYPES[checkpoint.stored_dtype(name)]
            np.testing.assert_array_equal(stored.astype(np.float32), weight)
            assert checkpoint.stored_bytes(name) == stored.nbytes
            if weight.ndim == 2:
                turned = checkpoint.read_out_in(name)
                assert turned.flags.c_contiguous
                assert turned.dtype == np.float32
                np.testing.assert_array_equal(turned, weight.T)


def test_messages_name_the_layout_and_what_is_passed_over(tmp_path):
    frequencies = 500000.0 ** -(np.arange(16) / 16)
    config = tiny_config(num_nextn_predict_layers=1)
    weights = write_checkpoint(tmp_path, config)
    config["num_nextn_predict_layers"] = 0
    mtp = stored_weights(config, {n: w for n, w in weights.items() if ".mtp_" in n}, "pt", "bf16")
    write_checkpoint(tmp_path, config, extra={
        **mtp,
        "lm_head.weight": weights["ernie.embed_tokens.weight"],
        "model.rotary_emb.inv_freq": frequencies.astype(np.float32),
    })  # fmt: skip
    messages = open_checkpoint(tmp_path).messages
    assert messages[0] == "-PT layout (Hugging Face names, [out, in])"
    assert "lm_head.weight: config.json ties" in messages[1] and "equal" in messages[1]
    assert "passing over 12 tensors for multi-token prediction: config.json says" in messages[2]
    assert "1 tables of rotary frequencies" in messages[3]


@pytest.mark.parametrize("alias", ["mlp.gate.moe_statics.", "mlp.gate."])
def test_router_bias_under_the_gate(tmp_path, alias):
    weights = write_checkpoint(tmp_path)
    name = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    bias = load_file(tmp_path / "model.safetensors")[name]
    edit_tensors(tmp_path, {name: None, name.replace("mlp.moe_statics.", alias): bias})
    canonical = name.replace("model.", "ernie.")
    np.testing.assert_array_equal(open_checkpoint(tmp_path).read(canonical), weights[canonical])


# --- quantized ---


@pytest.mark.parametrize("format_name", QUANTIZED_FORMATS)
def test_quantized_matrix_is_dequantized(tmp_path, format_name):
    write_checkpoint(tmp_path, layout="paddle")
    packed = quantize_in_place(tmp_path, EXPERT, format_name)
    edit_config(tmp_path, paddle_ccq={"row_order": "plain"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.is_quantized
    assert checkpoint.format_of(EXPERT) == format_name
    assert checkpoint.format_of(DENSE) == "bf16"
    assert checkpoint.shape(EXPERT) == (128, 256)
    assert checkpoint.stored_bytes(EXPERT) == sum(value.nbytes for value in packed.values())
    for suffix, value in checkpoint.packed(EXPERT).items():
        np.testing.assert_array_equal(value, packed[suffix])
    expected = formats.decode(format_name, packed, "bfloat16")
    np.testing.assert_array_equal(checkpoint.read(EXPERT), expected)
    turned = checkpoint.read_out_in(EXPERT)
    assert turned.flags.c_contiguous
    np.testing.assert_array_equal(turned, expected.T)
    with pytest.raises(ValueError, match="packed as"):
        checkpoint.read_stored(EXPERT)


def test_row_order_is_recorded_asked_or_assumed(tmp_path):
    write_checkpoint(tmp_path, layout="paddle")
    packed = quantize_in_place(tmp_path, EXPERT, "wint2")
    plain = formats.decode("wint2", packed, "bfloat16")
    restored = row_order.unpermute_rows(plain)
    edit_config(tmp_path, quantization_config={"quantization": "wint2"})
    assumed = open_checkpoint(tmp_path)
    assert assumed.row_order == "fastdeploy-2.1"
    assert "taking fastdeploy-2.1" in assumed.messages[-1]
    np.testing.assert_array_equal(assumed.read(EXPERT), restored)
    np.testing.assert_array_equal(open_checkpoint(tmp_path, "plain").read(EXPERT), plain)
    edit_config(tmp_path, paddle_ccq={"row_order": "fastdeploy-2.1", "version": "0"})
    recorded = open_checkpoint(tmp_path)
    assert recorded.provenance["version"] == "0"
    assert not any("taking" in message for message in recorded.messages)
    np.testing.assert_array_equal(recorded.read(EXPERT), restored)
    with pytest.raises(CcqError, match=r"recorded as fastdeploy-.*, not as the asked plain"):
        open_checkpoint(tmp_path, "plain")


def test_row_order_concerns_wint2_only(tmp_path):
    write_checkpoint(tmp_path, layout="paddle")
    packed = quantize_in_place(tmp_path, EXPERT, "ccq-2.75")
    edit_config(tmp_path, paddle_ccq={"row_order": "fastdeploy-2.1"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.row_order is None
    np.testing.assert_array_equal(
        checkpoint.read(EXPERT), formats.decode("ccq-2.75", packed, "bfloat16")
    )


def test_scales_of_dense_linears_may_be_any_float(tmp_path):
    write_checkpoint(tmp_path, layout="paddle")
    packed = quantize_in_place(tmp_path, DENSE, "wint8")
    scale = DENSE.removesuffix("weight") + "weight_scale"
    edit_tensors(tmp_path, {scale: packed["weight_scale"].astype(np.float32)})
    read = open_checkpoint(tmp_path).read(DENSE)
    np.testing.assert_array_equal(read, formats.decode("wint8", packed, "bfloat16"))


def test_unconverted_linear_keeps_the_packed_name(tmp_path):
    weights = write_checkpoint(tmp_path, layout="paddle")
    values = load_file(tmp_path / "model.safetensors")[DENSE]
    edit_tensors(tmp_path, {DENSE: None, DENSE.removesuffix("weight") + "quant_weight": values})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format_of(DENSE) == "bf16"
    np.testing.assert_array_equal(checkpoint.read(DENSE), weights[DENSE])
    np.testing.assert_array_equal(checkpoint.read_out_in(DENSE), weights[DENSE].T)


def test_incomplete_packed_matrix_is_refused(tmp_path):
    write_checkpoint(tmp_path, layout="paddle")
    quantize_in_place(tmp_path, EXPERT, "wint2")
    prefix = EXPERT.removesuffix(".weight")
    edit_tensors(tmp_path, {f"{prefix}.code_zp": None})
    with pytest.raises(
        CcqError, match=r"up_gate_proj.weight .* none of the known .*code_scale F32"
    ):
        open_checkpoint(tmp_path)
    edit_tensors(tmp_path, {f"{prefix}.quant_weight": None})
    with pytest.raises(CcqError, match="no quant_weight beside it"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", ["quant_weight", "weight_scale", "super_scales", "code_zp"])
@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_packed_tensor_of_wrong_shape_or_dtype_is_refused(tmp_path, suffix, change):
    write_checkpoint(tmp_path, layout="paddle")
    value = quantize_in_place(tmp_path, EXPERT, "wint2")[suffix]
    wrong = value[:-1] if change == "shape" else value.astype(np.int32)
    edit_tensors(tmp_path, {EXPERT.removesuffix("weight") + suffix: wrong})
    with pytest.raises(CcqError, match=r"model.safetensors: .*experts.0.up_gate_proj.*none of the"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("own", "problem"),
    [([1], "paddle_ccq: not an object"), ({"row_order": "odd"}, "row_order: 'odd' is not one of")],
)
def test_malformed_provenance_is_refused(tmp_path, own, problem):
    write_checkpoint(tmp_path)
    edit_config(tmp_path, **{PROVENANCE_KEY: own})
    with pytest.raises(CcqError, match=f"config.json: .*{problem}"):
        open_checkpoint(tmp_path)


def test_unknown_row_order_argument(tmp_path):
    write_checkpoint(tmp_path)
    with pytest.raises(CcqError, match="row order 'odd'"):
        open_checkpoint(tmp_path, "odd")


# --- refusals ---


def test_no_such_folder_and_a_file(tmp_path):
    with pytest.raises(CcqError, match="none: no such folder"):
        open_checkpoint(tmp_path / "none")
    (tmp_path / "f").write_text("")
    with pytest.raises(CcqError, match="not a folder"):
        open_checkpoint(tmp_path / "f")


def test_folder_without_config(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CcqError, match=r"config\.json: no such file"):
        open_checkpoint(tmp_path)


def test_missing_tensors_are_counted_and_the_first_is_named(tmp_path):
    write_checkpoint(tmp_path)
    first = "model.layers.1.mlp.experts.2.up_proj.weight"
    edit_tensors(tmp_path, {first: None, "model.layers.2.self_attn.k_proj.weight": None})
    with pytest.raises(CcqError, match=f"2 tensors are missing, the first '{first}'"):
        open_checkpoint(tmp_path)
    edit_tensors(tmp_path, {first: np.zeros((128, 128), np.float32)})
    with pytest.raises(CcqError, match=r"1 tensor is missing, .*k_proj"):
        open_checkpoint(tmp_path)


def test_wrong_shape_is_named(tmp_path):
    write_checkpoint(tmp_path)
    wrong = {"model.layers.0.mlp.down_proj.weight": np.zeros((128, 255), np.float32)}
    edit_tensors(tmp_path, wrong)
    with pytest.raises(CcqError, match=r"down_proj.weight: has shape \[128, 255\], config.json"):
        open_checkpoint(tmp_path)


def test_transposed_tensor_is_explained(tmp_path):
    write_checkpoint(tmp_path, layout="paddle")
    name = "ernie.layers.0.mlp.down_proj.weight"
    edit_tensors(tmp_path, {name: np.zeros((128, 256), np.float32)})
    with pytest.raises(CcqError, match="transposed: two layouts are mixed"):
        open_checkpoint(tmp_path)


def test_integer_weight_is_refused(tmp_path):
    write_checkpoint(tmp_path)
    edit_tensors(tmp_path, {"model.norm.weight": np.zeros(128, np.int8)})
    with pytest.raises(CcqError, match=r"model.norm.weight: has dtype I8, not one of BF16"):
        open_checkpoint(tmp_path)


def test_bias_tensor_is_refused(tmp_path):
    write_checkpoint(tmp_path, extra={"model.layers.0.self_attn.q_proj.bias": np.zeros(128, "f4")})
    with pytest.raises(CcqError, match=r"q_proj.bias' is a bias"):
        open_checkpoint(tmp_path)


def test_mixed_layouts_are_refused(tmp_path):
    write_checkpoint(tmp_path, extra={"ernie.norm.weight": np.zeros(128, np.float32)})
    with pytest.raises(CcqError, match="two layouts"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("how", ["name", "journal"])
def test_unfinished_output_is_refused(tmp_path, how):
    folder = tmp_path / ("out.ccq-partial" if how == "name" else "out")
    write_checkpoint(folder)
    if how == "journal":
        (folder / "journal.jsonl").write_text("")
    with pytest.raises(CcqError, match="an unfinished output"):
        open_checkpoint(folder)


def test_rank_folders_are_refused(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "rank0").mkdir()
    (tmp_path / "rank1").mkdir()
    with pytest.raises(CcqError, match="into 2 rank folders"):
        open_checkpoint(tmp_path)
