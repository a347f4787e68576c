# SPDX-License-Identifier: Apache-2.0
"""FP8 sources: value x scale bit for bit, and errors that name tensor and block."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from helpers.published import E4M3, FP8_CONFIG, fp8, from_fp8
from helpers.synthetic import write_tensors
from paddle_ccq.checkpoint.safetensors_io import TensorFolder
from paddle_ccq.checkpoint.sources.locate import expected, locate
from paddle_ccq.checkpoint.sources.scheme import SourceScheme
from paddle_ccq.checkpoint.sources.stored import StoredWeight
from paddle_ccq.codec import block_scales
from paddle_ccq.codec.fp8 import decode_e4m3
from paddle_ccq.errors import CcqError
from paddle_ccq.families.tensor import Source

NAME = "model.layers.3.mlp.experts.7.gate_proj.weight"
SCALE = NAME + "_scale_inv"
QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def find(folder, shape, config=FP8_CONFIG, name=NAME) -> StoredWeight | None:
    scheme = SourceScheme.read({"quantization_config": config} if config else {}, "config.json")
    return locate(TensorFolder(folder), scheme, Source(name, shape))


def random(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.02


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def test_every_code_has_torchs_value():
    torch = pytest.importorskip("torch")
    codes = np.arange(256, dtype=np.uint8)
    wanted = torch.from_numpy(codes).view(torch.float8_e4m3fn).to(torch.float32).numpy()
    np.testing.assert_array_equal(decode_e4m3(codes), wanted)  # NaN equal to NaN
    scales = torch.from_numpy(codes).view(torch.float8_e8m0fnu).to(torch.float32).numpy()
    np.testing.assert_array_equal(block_scales.scale_values(codes), scales)
    finite = np.isfinite(wanted)
    assert (bits(decode_e4m3(codes)[finite]) == bits(wanted[finite])).all()


def test_a_published_matrix_is_value_times_scale(tmp_path):
    shape = (300, 520)  # partial blocks below and at the right
    values, scales = fp8(random(shape))
    save_file({NAME: values, SCALE: scales}, tmp_path / "model.safetensors")
    weight = find(tmp_path, shape)
    read = weight.read()
    assert read.dtype == np.float32
    np.testing.assert_array_equal(bits(read), bits(from_fp8(values, scales)))
    assert weight.names == (NAME, SCALE) and weight.dtype == "F8_E4M3"
    assert weight.nbytes == 300 * 520 + 3 * 5 * 4
    assert weight.specs == ((NAME, "F8_E4M3", shape), (SCALE, "F32", (3, 5)))
    out = np.zeros((520, 300), np.float32).T  # not C-contiguous
    weight.read_into(out)
    np.testing.assert_array_equal(out, read)


def test_torch_gives_the_same_bits(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    generator = torch.Generator().manual_seed(3)
    weight = torch.randn((257, 384), generator=generator)
    scales = torch.rand((3, 3), generator=generator) * 0.01 + 1e-4
    stretched = scales.repeat_interleave(128, 0)[:257].repeat_interleave(128, 1)
    values = (weight * 0.02 / stretched).to(torch.float8_e4m3fn)
    save_torch({NAME: values, SCALE: scales}, tmp_path / "model.safetensors")
    wanted = values.to(torch.float32) * stretched
    read = find(tmp_path, (257, 384)).read()
    np.testing.assert_array_equal(bits(read), bits(wanted.numpy()))


@QUICK
@given(data=st.data())
def test_any_shape_and_block(tmp_path, data):
    shape = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    block = data.draw(st.tuples(st.integers(1, 48), st.integers(1, 48)))
    seed = data.draw(st.integers(0, 99))
    values, scales = fp8(random(shape, seed), block)
    kind = data.draw(st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float16]))
    scales = (scales * 1000).astype(kind)  # half precision has no smaller ones
    save_file({NAME: values, SCALE: scales}, tmp_path / "model.safetensors")
    read = find(tmp_path, shape, {**FP8_CONFIG, "weight_block_size": list(block)}).read()
    np.testing.assert_array_equal(bits(read), bits(from_fp8(values, scales, block)))


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e8m0fnu, np.uint8])
def test_scales_in_ue8m0(tmp_path, dtype):
    values, _ = fp8(random((256, 256)))
    exponents = np.array([[100, 0], [254, 119]], np.uint8)
    save_file({NAME: values, SCALE: exponents.view(dtype)}, tmp_path / "model.safetensors")
    with np.errstate(over="ignore"):
        wanted = from_fp8(values, np.ldexp(np.float32(1), exponents.astype(int) - 127))
    np.testing.assert_array_equal(bits(find(tmp_path, (256, 256)).read()), bits(wanted))


def test_the_scale_may_lie_in_another_shard(tmp_path):
    values, scales = fp8(random((128, 256)))
    tensors = {"a": np.zeros(3), NAME: values, SCALE: scales, "b": np.zeros(3)}
    write_tensors(tmp_path, tensors, shards=4)
    folder = TensorFolder(tmp_path)
    assert folder.path_of(NAME) != folder.path_of(SCALE)
    read = find(tmp_path, (128, 256)).read()
    np.testing.assert_array_equal(bits(read), bits(from_fp8(values, scales)))


@pytest.mark.parametrize(
    ("strategy", "block", "stored"),
    [
        ("tensor", (96, 64), ()),
        ("tensor", (96, 64), (1,)),
        ("channel", (1, 64), (96, 1)),
        ("channel", (1, 64), (96,)),
        ("block", (32, 16), (3, 4)),
    ],
)
def test_compressed_tensors_scales(tmp_path, strategy, block, stored):
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    if strategy == "block":
        weights["block_structure"] = list(block)
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    values, scales = fp8(random((96, 64)), block)
    scales = scales.astype(ml_dtypes.bfloat16)
    tensors = {NAME: values, NAME + "_scale": scales.reshape(stored)}
    save_file(tensors, tmp_path / "model.safetensors")
    read = find(tmp_path, (96, 64), {**config, "config_groups": groups}).read()
    np.testing.assert_array_equal(bits(read), bits(from_fp8(values, scales, block)))


# --- what is not right ---


def damaged(tmp_path, place, scale, code=None) -> StoredWeight:
    values, scales = fp8(random((300, 520)))
    scales[place] = scale
    if code is not None:
        values.view(np.uint8)[...] = code
    save_file({NAME: values, SCALE: scales}, tmp_path / "model.safetensors")
    return find(tmp_path, (300, 520))


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -0.5, 0.0, -0.0])
def test_a_wrong_scale_is_named_with_its_block(tmp_path, scale):
    weight = damaged(tmp_path, (2, 4), scale)
    place = re.escape("block [2, 4] (rows 256 to 299, columns 512 to 519)")
    with pytest.raises(CcqError, match=f"model.safetensors: {SCALE}: .*{place} of {NAME}"):
        weight.read()


def test_a_nan_in_ue8m0_is_a_wrong_scale(tmp_path):
    values, _ = fp8(random((128, 256)))
    exponents = np.array([[120, 255]], np.uint8).view(ml_dtypes.float8_e8m0fnu)
    save_file({NAME: values, SCALE: exponents}, tmp_path / "model.safetensors")
    with pytest.raises(CcqError, match=re.escape("scale nan of block [0, 1]")):
        find(tmp_path, (128, 256)).read()


@pytest.mark.parametrize("code", [0x00, 0x80])
def test_a_block_of_zeros_may_have_the_scale_zero(tmp_path, code):
    assert not damaged(tmp_path, (0, 0), 0.0, code).read().any()


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_the_block_of_a_nan_code_is_known(tmp_path, code):
    values, scales = fp8(random((300, 520)))
    values.view(np.uint8)[130, 400] = code
    values.view(np.uint8)[299, 0] = code
    save_file({NAME: values, SCALE: scales}, tmp_path / "model.safetensors")
    weight = find(tmp_path, (300, 520))
    assert np.isnan(weight.read()[130, 400])
    place = "block [1, 3] (rows 128 to 255, columns 384 to 511)"
    assert weight.nonfinite_place() == f"{place} of {NAME}"
    assert damaged(tmp_path, (0, 0), 1.0).nonfinite_place() is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({SCALE: None}, f"its scales {SCALE} are missing"),
        ({SCALE: np.ones((2, 4), np.float32)}, r"has shape \[2, 4\]; .* need \[3, 5\]"),
        ({SCALE: np.ones(15, np.float32)}, r"has shape \[15\]"),
        ({SCALE: np.ones((3, 5), np.int32)}, "has dtype I32, not one of BF16"),
        ({NAME: np.zeros((300, 520), ml_dtypes.float8_e5m2)}, "has dtype F8_E5M2"),
        ({NAME: np.zeros((300, 520), np.int8)}, "has dtype I8"),
        ({NAME: np.zeros((520, 300), E4M3)}, "transposed"),
        ({NAME: np.zeros((300, 512), E4M3)}, r"has shape \[300, 512\], config.json calls for"),
        ({NAME: np.zeros((300, 520), np.float32)}, f"has dtype F32, but {SCALE} is there as well"),
    ],
)
def test_wrong_tensors_are_refused_by_name(tmp_path, changes, problem):
    values, scales = fp8(random((300, 520)))
    tensors = {NAME: values, SCALE: scales, **changes}
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(CcqError, match=problem) as error:
        find(tmp_path, (300, 520))
    assert "model.safetensors" in str(error.value) and NAME in str(error.value)


def test_fp8_without_a_word_in_config_json_is_refused(tmp_path):
    values, scales = fp8(random((300, 520)))
    save_file({NAME: values, SCALE: scales}, tmp_path / "model.safetensors")
    with pytest.raises(CcqError, match=r"stored as FP8, of which config.json says nothing"):
        find(tmp_path, (300, 520), config=None)


def test_a_vector_in_fp8_is_refused(tmp_path):
    tensors = {NAME: np.zeros(8, E4M3), SCALE: np.ones(1, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CcqError, match="has dtype F8_E4M3, not one of BF16, F16, F32"):
        find(tmp_path, (8,))


def test_what_is_not_there_is_none(tmp_path):
    save_file({SCALE: np.ones((3, 5), np.float32)}, tmp_path / "model.safetensors")
    assert find(tmp_path, (300, 520)) is None


def test_expected_from_config_json_alone():
    config = {**FP8_CONFIG, "modules_to_not_convert": ["lm_head", "gate"]}
    scheme = SourceScheme.read({"quantization_config": config}, "config.json")
    source = Source(NAME, (300, 520))
    wanted = ((NAME, "F8_E4M3", (300, 520)), (SCALE, "F32", (3, 5)))
    assert expected(scheme, source, "BF16", linear=True) == wanted
    assert expected(scheme, source, "BF16", linear=False) == ((NAME, "BF16", (300, 520)),)
    for name in ("model.layers.3.mlp.gate.weight", "lm_head.weight"):
        found = expected(scheme, Source(name, (8, 16)), "BF16", linear=True)
        assert found == ((name, "BF16", (8, 16)),)


def test_the_scale_of_inputs_belongs_to_the_values(tmp_path):
    values, scales = fp8(random((128, 256)))
    inputs = NAME.replace(".weight", ".input_scale")
    tensors = {NAME: values, SCALE: scales, inputs: np.float32(0.5).reshape(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    weight = find(tmp_path, (128, 256))
    assert weight.names == (NAME, SCALE, inputs)
    np.testing.assert_array_equal(weight.read(), from_fp8(values, scales))
