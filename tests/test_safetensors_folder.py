# SPDX-License-Identifier: Apache-2.0
"""A folder of safetensors files: its index and shards, how they are cut, and parts of a tensor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from helpers.synthetic import TENSOR_SPECS as SPECS
from paddle_ccq.checkpoint import safetensors_io as io
from paddle_ccq.errors import CcqError


def sharded(folder: Path, weight_map: dict | None = None) -> Path:
    """Tensors a, b in shard 1 and c in shard 2."""
    save_file({"a": np.zeros(2, "u1"), "b": np.ones(2, "u1")}, folder / io.shard_name(0, 2))
    save_file({"c": np.zeros(2, "u1")}, folder / io.shard_name(1, 2))
    correct = {"a": io.shard_name(0, 2), "b": io.shard_name(0, 2), "c": io.shard_name(1, 2)}
    index = {"weight_map": {**correct, **(weight_map or {})}}
    (folder / io.INDEX_FILE).write_text(json.dumps(index))
    return folder


def test_sharded_folder(tmp_path):
    folder = io.TensorFolder(sharded(tmp_path))
    assert sorted(folder.names()) == ["a", "b", "c"]
    assert "c" in folder
    assert folder.path_of("c").name == io.shard_name(1, 2)
    np.testing.assert_array_equal(folder.read("b"), [1, 1])


def test_missing_shard_is_named(tmp_path):
    (sharded(tmp_path) / io.shard_name(1, 2)).unlink()
    with pytest.raises(CcqError, match=r"model-00002-of-00002.safetensors: .*missing \(1 of 2"):
        io.TensorFolder(tmp_path)


def test_tensor_absent_from_its_shard(tmp_path):
    sharded(tmp_path, {"nowhere": io.shard_name(0, 2)})
    with pytest.raises(CcqError, match="places tensor 'nowhere' here, but no shard has it"):
        io.TensorFolder(tmp_path)


def test_tensor_in_another_shard(tmp_path):
    sharded(tmp_path, {"c": io.shard_name(0, 2), "x": io.shard_name(1, 2)})
    with pytest.raises(CcqError, match=r"00001-of-00002.*'c' here, but it is in model-00002"):
        io.TensorFolder(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    sharded(tmp_path)
    arrays = {"c": np.zeros(2, "u1"), "a": np.zeros(2, "u1")}
    save_file(arrays, tmp_path / io.shard_name(1, 2))
    with pytest.raises(CcqError, match=r"'a' is also in model-00001"):
        io.TensorFolder(tmp_path)


def test_unlisted_tensor_is_reported(tmp_path):
    sharded(tmp_path)
    index = tmp_path / io.INDEX_FILE
    content = json.loads(index.read_text())
    del content["weight_map"]["b"]
    index.write_text(json.dumps(content))
    folder = io.TensorFolder(tmp_path)
    assert "b" not in folder
    assert "'b'" in folder.messages[0]


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "a/b", "", "..", 7, "a\0.safetensors"]
)
def test_index_may_not_point_elsewhere(tmp_path, shard):
    sharded(tmp_path, {"a": shard})
    with pytest.raises(CcqError, match="not the plain name"):
        io.TensorFolder(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_index_without_map(tmp_path, content):
    (tmp_path / io.INDEX_FILE).write_text(content)
    with pytest.raises(CcqError, match="no weight_map"):
        io.TensorFolder(tmp_path)


def test_single_file_beside_an_index_of_others(tmp_path):
    sharded(tmp_path)
    save_file({"a": np.zeros(2, "u1")}, tmp_path / io.SINGLE_FILE)
    with pytest.raises(CcqError, match="holds both"):
        io.TensorFolder(tmp_path)


@pytest.mark.parametrize(
    "name", ["model_state.pdparams", "pytorch_model.bin", "model.pt", "x.pth", "last.ckpt"]
)
def test_pickle_only_folder_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CcqError, match=f"{name}: a pickle file"):
        io.TensorFolder(tmp_path)


def test_folders_without_tensors(tmp_path):
    with pytest.raises(CcqError, match="neither model"):
        io.TensorFolder(tmp_path)
    with pytest.raises(CcqError, match="no such folder"):
        io.TensorFolder(tmp_path / "none")
    save_file({"a": np.zeros(2, "u1")}, tmp_path / io.shard_name(0, 2))
    with pytest.raises(CcqError, match="json is missing"):
        io.TensorFolder(tmp_path)


# --- shards ---


def test_split_shards_keeps_order_and_limit():
    specs = [(str(i), "U8", (size,)) for i, size in enumerate([3, 3, 9, 1, 4, 5, 0])]
    shards = io.split_shards(specs, 6)
    assert [spec for shard in shards for spec in shard] == specs
    assert [[io.tensor_bytes(d, s) for _, d, s in shard] for shard in shards] == [
        [3, 3],
        [9],
        [1, 4],
        [5, 0],
    ]


def test_index_bytes():
    index = json.loads(io.index_bytes({"x": SPECS[:1], "y": SPECS[1:]}))
    assert index["weight_map"] == {"a": "x", "b": "y", "c": "y", "d": "y", "empty": "y"}
    assert index["metadata"]["total_size"] == 24 + 4 + 10 + 6


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("4GiB", 4 << 30), ("123", 123), ("1.5k", 1500)],
)
def test_parse_size(text, size):
    assert io.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-5GB", "5XB", "five"])
def test_parse_size_refuses(text):
    with pytest.raises(CcqError, match="--max-shard-size"):
        io.parse_size(text)


# --- parts of a tensor ---


def test_rows_of_an_entry_are_read_alone(tmp_path):
    stacked = np.arange(3 * 6 * 4, dtype=np.float32).reshape(3, 6, 4)
    save_file({"x": np.zeros(5, np.uint8), "y": stacked}, tmp_path / "model.safetensors")
    folder = io.TensorFolder(tmp_path)
    for index in range(3):
        for rows in (slice(0, 6), slice(0, 3), slice(3, 6), slice(2, 2)):
            found = folder.read_rows("y", index, rows)
            np.testing.assert_array_equal(found, stacked[index][rows])
            assert found.nbytes == (rows.stop - rows.start) * 16
    other = folder.with_replaced({"y": -stacked})
    np.testing.assert_array_equal(other.read_rows("y", 1, slice(1, 3)), -stacked[1, 1:3])


def test_a_file_cut_after_opening_is_refused_when_rows_are_read(tmp_path):
    save_file({"y": np.zeros((2, 6, 4), np.float32)}, tmp_path / "model.safetensors")
    folder = io.TensorFolder(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    folder.read_rows("y", 0, slice(0, 6))
    with pytest.raises(CcqError, match="ends inside tensor 'y'"):
        folder.read_rows("y", 1, slice(0, 6))
