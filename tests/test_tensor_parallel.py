# SPDX-License-Identifier: Apache-2.0
"""Rank folders: each rank's tensors are those of its part of the float matrix."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.checkpoint.tensor_parallel import join, take
from paddle_ccq.codec import formats
from paddle_ccq.codec.row_order import permute_rows
from paddle_ccq.encoder.factory import make_encoder
from paddle_ccq.errors import CcqError
from paddle_ccq.families.registry import read_config
from paddle_ccq.families.tensor import Cut
from paddle_ccq.quantize import main, quantize
from paddle_ccq.verify import verify

CONFIG = tiny_config(
    num_hidden_layers=3, moe_num_experts=2, moe_intermediate_size=256, tie_word_embeddings=False
)
Q, KV = 128, 64


def by_hand(name: str, weight: np.ndarray, rank: int) -> np.ndarray:
    """Rank `rank` of 2 of a matrix [in, out], cut the way FastDeploy's weight_infos says."""
    half = slice(rank, rank + 1)

    def columns(part):
        return np.split(part, 2, axis=1)[rank]

    if name.endswith("qkv_proj.weight"):
        q, k, v = np.split(weight, [Q, Q + KV], axis=1)
        return np.concatenate([columns(q), columns(k), columns(v)], axis=1)
    if name.endswith("up_gate_proj.weight"):
        gate, up = np.split(weight, 2, axis=1)
        return np.concatenate([columns(gate), columns(up)], axis=1)
    if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight")):
        return np.concatenate([np.split(weight, 2, axis=0)[i] for i in range(2)[half]])
    if name == "lm_head.weight":
        return columns(weight)
    return weight


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tp")
    weights = write_checkpoint(root / "m", CONFIG)
    quantize(
        root / "m",
        root / "out",
        tensor_parallel_size=2,
        wint4_end_layer=1,
        preset="fast",
        max_shard_size="200kB",
        quiet=True,
    )
    return root / "m", root / "out", weights


def read_rank(folder: Path) -> dict[str, np.ndarray]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {}
    for shard in sorted(set(index.values())):
        with safe_open(folder / shard, framework="np") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert sorted(tensors) == sorted(index)
    return tensors


def test_folders(folders):
    _, out, _ = folders
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["rank0", "rank1"]
    assert not list(out.glob("*.safetensors*"))
    assert (out / "config.json").is_file() and (out / "tokenizer.json").is_file()
    assert not list(out.glob("rank*/config.json"))
    config = json.loads((out / "config.json").read_text())
    assert config["paddle_ccq"]["tensor_parallel_size"] == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_holds_the_encoding_of_its_float_part(folders, rank):
    _, out, weights = folders
    stored = read_rank(out / f"rank{rank}")
    encoders = {f: make_encoder(f, "fast", threads=1) for f in ("wint8", "wint4", "wint2")}
    used = set()
    for name, weight in weights.items():
        part = by_hand(name, weight, rank)
        stem = name.removesuffix(".weight")
        if name in stored:
            np.testing.assert_array_equal(stored[name].astype(np.float32), part)
            used.add(name)
            continue
        early = int(name.split(".")[2]) <= 1
        format = "wint8" if ".experts." not in name else "wint4" if early else "wint2"
        rows = permute_rows(part) if format == "wint2" else part
        expected = encoders[format].encode(np.ascontiguousarray(rows.T)).tensors
        assert expected.keys() == formats.tensor_specs(format, *part.shape).keys()
        for suffix, array in expected.items():
            assert stored[f"{stem}.{suffix}"].tobytes() == array.tobytes(), (stem, suffix)
            used.add(f"{stem}.{suffix}")
    assert used == set(stored)


def test_ranks_together_are_as_close_as_one_folder(folders, tmp_path):
    model, out, _ = folders
    quantize(model, tmp_path / "one", wint4_end_layer=1, preset="fast", quiet=True)
    whole = {m["name"]: m for m in verify(tmp_path / "one", model).matrices}
    result = verify(out, model)
    assert result.sound
    assert len(result.matrices) == len(whole)
    for matrix in result.matrices:
        assert matrix["format"] == whole[matrix["name"]]["format"]
        assert matrix["rel_mse"] < 1.1 * whole[matrix["name"]]["rel_mse"]


@pytest.mark.parametrize("name", ["qkv_proj", "up_gate_proj", "o_proj", "down_proj"])
@pytest.mark.parametrize("size", [2])
def test_cutting_either_orientation_and_joining(name, size):
    config = read_config(CONFIG)
    full, spec = next((n, t) for n, t in config.tensors.items() if t.projection == name)
    shape, cut = spec.shape, spec.cut
    weight = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    parts = [take(weight, cut, rank, size) for rank in range(size)]
    for rank, part in enumerate(parts):
        np.testing.assert_array_equal(part, by_hand(full, weight, rank))
        turned = take(np.ascontiguousarray(weight.T), cut, rank, size, transposed=True)
        assert turned.flags.c_contiguous
        np.testing.assert_array_equal(turned.T, part)
    np.testing.assert_array_equal(join(parts, cut), weight)


def test_cut_by_more_ranks():
    cut = Cut(1, (8, 4, 4), unit=2)
    assert cut.fits(2) and not cut.fits(4)
    assert cut.blocks(1, 2) == [(4, 8), (10, 12), (14, 16)]
    assert cut.rank_shape((3, 16), 2) == (3, 8)
    assert take(np.ones((3, 3)), None, 1, 4).shape == (3, 3)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (3, "ernie.embed_tokens.weight: 320 can't be cut into 3 equal parts"),
        (4, "4 query and 2 key heads can't be shared out evenly over 4 ranks"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_work(folders, tmp_path, capsys, size, text):
    model, _, _ = folders
    flags = ["--model", str(model), "--output", str(tmp_path / "x")]
    assert main([*flags, "--tensor_parallel_size", str(size)]) == 2
    error = capsys.readouterr().err
    assert text in error and "sizes that work: 1, 2" in error
    assert list(tmp_path.iterdir()) == []


def test_expert_width_decides(tmp_path):
    config = read_config(tiny_config(moe_intermediate_size=384))
    from paddle_ccq.targets.fastdeploy.layout import build_plan

    with pytest.raises(CcqError, match=r"down_proj.weight: wint2 needs K .* got 192"):
        build_plan(config, tensor_parallel_size=2)
