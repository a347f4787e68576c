# SPDX-License-Identifier: Apache-2.0
"""Safetensors reading refuses what is damaged; the writer streams, resumes and is deterministic."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from helpers.synthetic import TENSOR_SPECS as SPECS
from paddle_ccq.checkpoint import safetensors_io as io
from paddle_ccq.errors import CcqError

QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def values(specs, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.integers(0, 100, s).astype(io.DTYPES[d]).reshape(s) for n, d, s in specs}


def write(path: Path, specs=SPECS, metadata=None) -> dict[str, np.ndarray]:
    arrays = values(specs)
    with io.SafetensorsWriter(path, specs, metadata) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    return arrays


def raw_file(path: Path, header: object, data: bytes = b"", size: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data)
    return path


def entry(shape, begin, end, dtype="U8") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# --- writing ---


def test_written_file_loads_in_the_library(tmp_path):
    path = tmp_path / "x.safetensors"
    arrays = write(path, metadata={"format": "pt", "a": "b"})
    with safe_open(path, "np") as file:
        assert sorted(file.keys()) == sorted(name for name, _, _ in SPECS)
        assert file.metadata() == {"format": "pt", "a": "b"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)


def test_header_is_aligned_and_deterministic():
    for metadata in ({}, {"x": "1"}, {"y": "22", "x": "é"}):
        header = io.build_header(SPECS, metadata)
        assert len(header) % 8 == 0
        assert header == io.build_header(SPECS, dict(reversed(metadata.items())))


def test_writer_reports_size_and_hash(tmp_path):
    path = tmp_path / "x.safetensors"
    writer = io.SafetensorsWriter(path, SPECS)
    for name, array in values(SPECS).items():
        writer.write(name, array)
    writer.close()
    assert writer.nbytes == path.stat().st_size
    assert writer.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("n_done", range(len(SPECS) + 1))
@pytest.mark.parametrize("tail", ["cut", "garbage", "exact"])
def test_resumed_file_equals_uninterrupted_file(tmp_path, n_done, tail):
    whole, path = tmp_path / "whole", tmp_path / "cut"
    arrays = write(whole, metadata={"format": "pt"})
    content = whole.read_bytes()
    end = len(io.build_header(SPECS, {"format": "pt"}))
    end += sum(io.tensor_bytes(d, s) for _, d, s in SPECS[:n_done])
    rest = {"cut": content[end : end + 1], "garbage": b"\xff" * 99, "exact": b""}[tail]
    path.write_bytes(content[:end] + rest)
    seen = []
    writer = io.SafetensorsWriter.resume(
        path, SPECS, {"format": "pt"}, n_done, lambda name, digest: seen.append((name, digest))
    )
    assert writer.sha256() == hashlib.sha256(content[:end]).hexdigest()
    assert seen == [
        (name, hashlib.sha256(arrays[name].tobytes()).hexdigest()) for name, _, _ in SPECS[:n_done]
    ]
    for name, _, _ in SPECS[n_done:]:
        writer.write(name, arrays[name])
    writer.close()
    assert path.read_bytes() == content
    assert writer.sha256() == hashlib.sha256(content).hexdigest()


def test_resume_refuses_another_header(tmp_path):
    path = tmp_path / "x"
    write(path, metadata={"format": "pt"})
    with pytest.raises(CcqError, match=r"x: header differs"):
        io.SafetensorsWriter.resume(path, SPECS, {"format": "np"}, 1)


def test_resume_refuses_a_file_shorter_than_recorded(tmp_path):
    path = tmp_path / "x"
    write(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CcqError, match=r"ends inside 'd'"):
        io.SafetensorsWriter.resume(path, SPECS, None, len(SPECS))


@pytest.mark.parametrize(
    ("name", "array", "problem"),
    [
        ("b", np.zeros((3, 4), ml_dtypes.bfloat16), "'a' was announced"),
        ("a", np.zeros((3, 4), np.float32), "announced as BF16"),
        ("a", np.zeros((4, 3), ml_dtypes.bfloat16), "announced as BF16"),
    ],
)
def test_writer_enforces_order_dtype_and_shape(tmp_path, name, array, problem):
    with pytest.raises(ValueError, match=problem), io.SafetensorsWriter(tmp_path / "x", SPECS) as w:
        w.write(name, array)


def test_close_fails_when_tensors_are_missing(tmp_path):
    writer = io.SafetensorsWriter(tmp_path / "x", SPECS)
    with pytest.raises(ValueError, match="5 tensors missing, the first 'a'"):
        writer.close()


def test_writer_refuses_more_than_announced_and_duplicates(tmp_path):
    with io.SafetensorsWriter(tmp_path / "x", SPECS[1:2]) as writer:
        writer.write("b", np.float32(1).reshape(()))
        with pytest.raises(ValueError, match="after the last"):
            writer.write("c", np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="listed twice"):
        io.build_header([SPECS[0], SPECS[0]])


def test_full_disk_names_the_file(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    link = tmp_path / "x.safetensors"
    link.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as error:
        io.SafetensorsWriter(link, SPECS)
    assert error.value.filename == str(link)


specs_strategy = st.lists(
    st.tuples(
        st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__"),
        st.sampled_from(["BF16", "F16", "F32", "U8", "I8", "I16", "I64"]),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    max_size=6,
    unique_by=lambda spec: spec[0],
)


@QUICK
@given(specs=specs_strategy, metadata=st.dictionaries(st.text(max_size=4), st.text(max_size=4)))
def test_round_trip(tmp_path, specs, metadata):
    path = tmp_path / "x.safetensors"
    try:
        arrays = write(path, specs, metadata)
    except UnicodeEncodeError:
        return
    file = io.SafetensorsFile(path)
    assert file.metadata == metadata
    assert list(file.tensors) == [name for name, _, _ in specs]
    for name, array in arrays.items():
        read = file.read(name)
        assert read.dtype == array.dtype
        assert read.shape == array.shape
        assert read.tobytes() == array.tobytes()


# --- reading one file ---


def test_reads_what_the_library_wrote(tmp_path):
    arrays = {**values(SPECS), "half": np.ones((2, 2), np.float16)}
    save_file(arrays, tmp_path / "x.safetensors")
    file = io.SafetensorsFile(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.read(name), array)


DAMAGED = {
    "empty safetensors header": (b"", b"", 0),
    "header of 100000001 bytes": (b"{}", b"", 100_000_001),
    "truncated: header needs": (b"{}", b"", 999),
    "not valid JSON": (b"{nonsense", b"", None),
    "not valid JSON: 'utf-8'": (b'{"\xff": 1}', b"", None),
    "'a' occurs twice": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],'
        b'"data_offsets":[0,0]}}',
        b"",
        None,
    ),
    "not a JSON object": (b"[]", b"", None),
    "__metadata__": ({"__metadata__": {"a": 1}}, b"", None),
    "lacks dtype": ({"a": {"dtype": "U8"}}, b"", None),
    "'a' has dtype 'F4'": ({"a": entry([1], 0, 1, "F4")}, b"x", None),
    "'a' has dtype \\['U8'\\]": ({"a": entry([1], 0, 1, ["U8"])}, b"x", None),
    "'a' has an impossible shape": ({"a": entry([-1], 0, 1)}, b"x", None),
    "impossible shape": ({"a": entry([1 << 40, 1 << 40, 0], 0, 0)}, b"", None),
    "not two positions": ({"a": entry([1], True, 1)}, b"x", None),
    "takes 1 bytes": ({"a": entry([2], 0, 1)}, b"x", None),
    "'b' overlaps 'a'": ({"a": entry([2], 0, 2), "b": entry([2], 1, 3)}, b"xyz", None),
    "'b' leaves a hole after 'a'": ({"a": entry([1], 0, 1), "b": entry([1], 2, 3)}, b"xyz", None),
    "leaves a hole after the header": ({"a": entry([1], 1, 2)}, b"xy", None),
    "truncated: header describes": ({"a": entry([4], 0, 4)}, b"xyz", None),
    "trailing data": ({"a": entry([1], 0, 1)}, b"xyz", None),
}


@pytest.mark.parametrize("problem", DAMAGED)
def test_damaged_file_is_refused(tmp_path, problem):
    header, data, size = DAMAGED[problem]
    path = raw_file(tmp_path / "bad.safetensors", header, data, size)
    with pytest.raises(CcqError, match=problem) as error:
        io.SafetensorsFile(path)
    assert str(path) in str(error.value)


def test_git_lfs_pointer_is_recognised(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(CcqError, match="git lfs pull"):
        io.SafetensorsFile(path)


def test_file_cut_after_opening(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path)
    file = io.SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CcqError, match="ends inside tensor 'd'"):
        file.read("d")


def attempt(path: Path) -> None:
    """Opening and reading may refuse, and must not fail in any other way."""
    try:
        file = io.SafetensorsFile(path)
        for name in file.tensors:
            file.read(name)
    except CcqError as error:
        assert path.name in str(error)
        assert "\n" not in str(error)


@QUICK
@given(content=st.binary(max_size=200))
def test_random_bytes_never_crash(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    attempt(path)
    attempt(raw_file(path, content))


json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
almost_entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "BF16", "F32", "F4", "F8_E4M3", 1]) | json_value,
        "shape": st.lists(st.integers(-1, 4) | st.integers(), max_size=3) | json_value,
        "data_offsets": st.lists(st.integers(-1, 9) | st.integers(), max_size=3) | json_value,
    }
)


@QUICK
@given(
    header=st.dictionaries(st.text(max_size=3), almost_entry | json_value, max_size=3),
    data=st.binary(max_size=12),
)
def test_fuzzed_headers_never_crash(tmp_path, header, data):
    attempt(raw_file(tmp_path / "x.safetensors", header, data))


@QUICK
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_flipped_header_bytes_never_crash(tmp_path, position, value):
    path = tmp_path / "x.safetensors"
    write(path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    attempt(path)


def test_deeply_nested_json_is_refused(tmp_path):
    with pytest.raises(CcqError, match="not valid JSON"):
        io.SafetensorsFile(raw_file(tmp_path / "x.safetensors", b"[" * 200_000))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_floats_of_8_bits_keep_their_bytes(tmp_path, dtype):
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    values = codes.view(io.DTYPES[dtype])
    with io.SafetensorsWriter(tmp_path / "model.safetensors", [("w", dtype, (16, 16))], None) as w:
        w.write("w", values)
    read = io.TensorFolder(tmp_path).read("w")
    assert read.dtype == io.DTYPES[dtype]
    np.testing.assert_array_equal(read.view(np.uint8), codes)
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        assert file.get_slice("w").get_dtype() == dtype
