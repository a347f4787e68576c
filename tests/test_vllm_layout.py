# SPDX-License-Identifier: Apache-2.0
"""Cutting stored tensors for a rank, and the order of integer weights: against the codec."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.checkpoint.safetensors_io import TensorFolder
from paddle_ccq.codec import formats, weight_only
from paddle_ccq.encoder.factory import make_encoder
from paddle_ccq.quantize import main
from paddle_ccq.vllm import layout
from paddle_ccq.vllm.layout import Piece

K, N = 256, 64


def stored(format: str) -> dict[str, np.ndarray]:
    weight = np.random.default_rng(5).standard_normal((N, K)).astype(np.float32)
    return make_encoder(format).encode(weight).tensors


def part_of(format: str, columns: list[Piece], rows: Piece) -> dict[str, np.ndarray]:
    n = sum(p.size for p in columns)
    tensors = stored(format)
    result = {}
    for suffix, (shape, _) in formats.tensor_specs(format, rows.size, n).items():
        part = np.zeros(shape, tensors[suffix].dtype)
        for target, source in layout.ccq_slices(format, suffix, K, columns, rows):
            part[target] = tensors[suffix][source]
        result[suffix] = part
    return result


@pytest.mark.parametrize("format", ["wint2", "ccq-2.5", "ccq-2.75"])
def test_a_part_decodes_to_the_part_of_the_whole(format: str) -> None:
    whole = formats.decode(format, stored(format), "float32")
    columns = layout.pieces([32, 32], 1, 2)
    assert columns == [Piece(0, 16, 16), Piece(16, 48, 16)]
    part = formats.decode(format, part_of(format, columns, Piece(0, 0, K)), "float32")
    np.testing.assert_array_equal(part, np.concatenate([whole[:, 16:32], whole[:, 48:]], axis=1))
    rows = Piece(0, 128, 128)
    part = formats.decode(format, part_of(format, [Piece(0, 0, N)], rows), "float32")
    np.testing.assert_array_equal(part, whole[128:])


@pytest.mark.parametrize("format,step", [("wint2", 128), ("ccq-2.5", 64)])
def test_a_torn_step_is_refused(format: str, step: int) -> None:
    suffix = "quant_weight"
    with pytest.raises(ValueError, match=f"steps of {step} rows"):
        list(layout.ccq_slices(format, suffix, K, [Piece(0, 0, N)], Piece(0, step // 2, step)))


@pytest.mark.parametrize("bits", [8, 4])
def test_integer_parts_are_parts_of_the_states(bits: int) -> None:
    tensors = stored(f"wint{bits}")["quant_weight"]
    states = weight_only.deinterleave(tensors, bits)
    columns, rows = layout.pieces([32, 32], 1, 2), Piece(0, 64, 128)
    raw = tensors.view(np.uint8)
    parts = [layout.states(p, bits) for p in layout.cut_interleaved(raw, bits, columns, rows)]
    found = np.concatenate(parts).astype(np.int16) - (1 << bits - 1)
    wanted = np.concatenate([states[64:192, 16:32], states[64:192, 48:]], axis=1)
    np.testing.assert_array_equal(found.T, wanted)
    with pytest.raises(ValueError, match="is cut in steps"):
        layout.cut_interleaved(raw, bits, [Piece(0, 1, 16)], rows)


def test_units_of_the_product_hold_what_the_header_says() -> None:
    bytes_ = np.random.default_rng(1).integers(0, 256, (48, 192), np.uint8)
    units = layout.product_units(bytes_)
    assert units.shape == (3, 3, 1024)
    for h, g, t, i in [(0, 0, 0, 0), (1, 3, 2, 7), (0, 7, 3, 15), (1, 7, 1, 4)]:
        byte = ((h * 8 + g) * 4 + t) * 16 + i
        for tile in range(3):
            for step in range(3):
                column, row = tile * 16 + 8 * h + g, step * 64 + 16 * t + i
                assert units[tile, step, byte] == bytes_[column, row]


def test_nibbles_hold_the_earlier_row_low() -> None:
    pairs = layout.nibble_pairs(np.array([[1, 2, 15, 0]], np.uint8))
    assert pairs.tolist() == [[0x21, 0x0F]]


def test_key_heads_are_repeated_where_ranks_are_more() -> None:
    found = [layout.pieces([64, 16, 16], rank, 4, [1, 2, 2]) for rank in range(4)]
    assert [p[0].source for p in found] == [0, 16, 32, 48]
    assert [p[1].source for p in found] == [64, 64, 72, 72]
    assert [p[2].source for p in found] == [80, 80, 88, 88]
    assert all(p[1].size == 8 and p[2].target == 24 for p in found)
    with pytest.raises(ValueError, match="equal parts"):
        layout.pieces([6], 0, 4)


@pytest.mark.parametrize("order", ["2.1", "2.0"])
def test_column_cuts_are_those_of_rank_folders_bit_for_bit(tmp_path: Path, order: str) -> None:
    model, whole, cut = (tmp_path / name for name in ("model", "whole", "cut"))
    config = tiny_config(hidden_size=128, moe_intermediate_size=256, intermediate_size=256)
    write_checkpoint(model, config)
    options = ["--model", str(model), "--quiet", "--fastdeploy-layout", order]
    assert main([*options, "--output", str(whole)]) == 0
    assert main([*options, "--output", str(cut), "--tensor-parallel-size", "2"]) == 0
    checkpoint = open_checkpoint(whole)
    compared = 0
    for rank in range(2):
        folder = TensorFolder(cut / f"rank{rank}")
        for name in checkpoint.names():
            if not name.endswith(("up_gate_proj.weight", "qkv_proj.weight")):
                continue
            format, (k, n) = checkpoint.format_of(name), checkpoint.shape(name)
            heads = [checkpoint.config.q_size, *[checkpoint.config.kv_size] * 2]
            parts = heads if "qkv" in name else [n // 2, n // 2]
            columns = layout.pieces(parts, rank, 2)
            for suffix, tensor in checkpoint.packed(name).items():
                stem = name.removesuffix("weight")
                wanted = folder.read(stem + suffix)
                if format == "wint8" and suffix == "quant_weight":
                    tiles = layout.cut_interleaved(tensor, 8, columns, Piece(0, 0, k))
                    found = np.concatenate(tiles).reshape(wanted.shape)
                elif format == "wint8":
                    found = np.concatenate([tensor[p.source : p.source + p.size] for p in columns])
                else:
                    found = np.zeros_like(wanted)
                    rows = Piece(0, 0, k)
                    for t, s in layout.ccq_slices(format, suffix, k, columns, rows):
                        found[t] = tensor[s]
                assert found.tobytes() == wanted.tobytes(), (name, suffix)
                compared += 1
    assert compared > 20
