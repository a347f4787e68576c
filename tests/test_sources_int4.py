# SPDX-License-Identifier: Apache-2.0
"""INT4 groups of compressed-tensors: bit for bit its own dequantization, and errors by name."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from helpers.published import from_int4, int4, int4_config
from paddle_ccq.checkpoint.safetensors_io import TensorFolder
from paddle_ccq.checkpoint.sources.locate import expected, locate
from paddle_ccq.checkpoint.sources.scheme import SourceScheme
from paddle_ccq.checkpoint.sources.stored import StoredWeight
from paddle_ccq.errors import CcqError
from paddle_ccq.families.tensor import Source

STEM = "model.layers.1.mlp.experts.0.down_proj"
NAME = f"{STEM}.weight"
QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(folder, tensors) -> None:
    stored = {f"{STEM}.{suffix}": v for suffix, v in tensors.items() if v is not None}
    save_file(stored, folder / "model.safetensors")


def find(folder, shape, config) -> StoredWeight | None:
    scheme = SourceScheme.read({"quantization_config": config}, "config.json")
    return locate(TensorFolder(folder), scheme, Source(NAME, shape))


def random(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.02


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def test_a_published_matrix_is_value_times_scale(tmp_path):
    tensors = int4(random((24, 100)))
    write(tmp_path, tensors)
    weight = find(tmp_path, (24, 100), int4_config())
    np.testing.assert_array_equal(bits(weight.read()), bits(from_int4(tensors, 100)))
    assert set(weight.names) == {f"{STEM}.{suffix}" for suffix in tensors}
    assert weight.nbytes == sum(value.nbytes for value in tensors.values())
    assert weight.dtype == "I32" and not weight.is_float


@QUICK
@given(data=st.data())
def test_any_shape_and_group(tmp_path, data):
    rows, columns = data.draw(st.tuples(st.integers(1, 24), st.integers(1, 80)))
    group = data.draw(st.sampled_from([16, 32, 64, 128]))
    tensors = int4(random((rows, columns), data.draw(st.integers(0, 99))), group)
    tensors["weight_shape"] = tensors["weight_shape"].astype(
        data.draw(st.sampled_from([np.int32, np.int64]))
    )
    write(tmp_path, tensors)
    read = find(tmp_path, (rows, columns), int4_config(group)).read()
    np.testing.assert_array_equal(bits(read), bits(from_int4(tensors, columns, group)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_compressed_tensors_gives_the_same_bits(tmp_path, group, symmetric):
    torch = pytest.importorskip("torch")
    packed = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from safetensors.torch import save_file as save_torch

    strategy = "channel" if group is None else "group"
    arguments = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": strategy}
    if group is not None:
        arguments["group_size"] = group
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**arguments)
    )
    rows, columns = 40, 256
    generator = torch.Generator().manual_seed(1)
    shape = (rows, columns // (group or columns))
    scale = (torch.rand(shape, generator=generator) * 0.01 + 1e-3).to(torch.bfloat16)
    given = {"weight": torch.randn((rows, columns), generator=generator) * 0.03}
    given["weight_scale"] = scale
    zero = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    given["weight_zero_point"] = zero
    compress = packed.PackedQuantizationCompressor.compress
    state = compress({**given, "weight_scale": scale.float()}, scheme)
    state["weight_scale"] = scale
    save_torch(
        {f"{STEM}.{name}": value.contiguous() for name, value in state.items()},
        tmp_path / "model.safetensors",
    )
    decompress = packed.PackedQuantizationCompressor.decompress
    # In the precision of the scales it is given: in float32 the product is exact, in bfloat16 it
    # is ours rounded.
    exact = decompress({**state, "weight_scale": scale.float()}, scheme)["weight"]
    rounded = decompress(dict(state), scheme)["weight"]
    read = find(tmp_path, (rows, columns), int4_config(**arguments)).read()
    np.testing.assert_array_equal(bits(read), bits(exact.numpy()))
    np.testing.assert_array_equal(
        read.astype(ml_dtypes.bfloat16).astype(np.float32), rounded.float().numpy()
    )


# --- what is not right ---


@pytest.mark.parametrize("scale", [np.nan, np.inf, 0.0, -1.0])
def test_a_wrong_scale_is_named_with_its_group(tmp_path, scale):
    tensors = int4(random((24, 100)))
    tensors["weight_packed"][5] = 0  # -8 everywhere
    tensors["weight_scale"][5, 3] = scale
    write(tmp_path, tensors)
    place = re.escape("block [5, 3] (rows 5 to 5, columns 96 to 99)")
    with pytest.raises(CcqError, match=f"{STEM}.weight_scale: .*{place} of {STEM}.weight_packed"):
        find(tmp_path, (24, 100), int4_config()).read()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"weight_scale": None}, "weight_scale is missing"),
        ({"weight_shape": None}, "weight_shape is missing"),
        ({"weight_scale": np.ones((24, 3), np.float32)}, r"has shape \[24, 3\]; .* need \[24, 4\]"),
        ({"weight_scale": np.ones((24, 4), np.int8)}, "has dtype I8"),
        ({"weight_packed": np.zeros((24, 12), np.int32)}, r"is I32 \[24, 12\], not I32 \[24, 13\]"),
        ({"weight_packed": np.zeros((24, 13), np.int64)}, "is I64"),
        ({"weight_shape": np.array([24, 100], np.float32)}, "is F32"),
        ({"weight_g_idx": np.zeros(100, np.int32)}, "has weight_g_idx"),
        ({"weight_zero_point": np.zeros((24, 4), np.int32)}, r"not I32 \[3, 4\]"),
    ],
)
def test_wrong_tensors_are_refused_by_name(tmp_path, changes, problem):
    write(tmp_path, {**int4(random((24, 100))), **changes})
    with pytest.raises(CcqError, match=problem) as error:
        find(tmp_path, (24, 100), int4_config())
    assert "model.safetensors" in str(error.value) and STEM in str(error.value)


def test_another_shape_inside_the_file_is_refused(tmp_path):
    tensors = {**int4(random((24, 100))), "weight_shape": np.array([24, 104])}
    write(tmp_path, tensors)
    with pytest.raises(CcqError, match=r"says \[24, 104\], config.json calls for \[24, 100\]"):
        find(tmp_path, (24, 100), int4_config()).read()


def test_another_group_size_than_stated_is_refused(tmp_path):
    write(tmp_path, int4(random((24, 128)), 64))
    with pytest.raises(CcqError, match=r"blocks of 1x32 in \[24, 128\] need \[24, 4\]"):
        find(tmp_path, (24, 128), int4_config(32))


def test_expected_from_config_json_alone():
    scheme = SourceScheme.read({"compression_config": int4_config()}, "config.json")
    found = expected(scheme, Source(NAME, (24, 100)), "BF16", linear=True)
    assert found == (
        (f"{STEM}.weight_packed", "I32", (24, 13)),
        (f"{STEM}.weight_scale", "BF16", (24, 4)),
        (f"{STEM}.weight_shape", "I64", (2,)),
    )
    for name in ("model.layers.1.self_attn.o_proj.weight", "lm_head.weight"):
        kept = expected(scheme, Source(name, (8, 16)), "BF16", linear=True)
        assert kept == ((name, "BF16", (8, 16)),)
