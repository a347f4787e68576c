# SPDX-License-Identifier: Apache-2.0
"""Dense products and attention: wrong sums, and sums that depend on what else is computed."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_ccq import _core
from paddle_ccq.codec import weight_only
from paddle_ccq.ops.attention import PLACES, attend, padded
from paddle_ccq.ops.dense import DenseMatrix, multiply

SETS = _core.float_instruction_sets()
KINDS = ["float32", "bfloat16", "int8", "int4"]


def matrix(kind: str, k: int, n: int, rng: np.random.Generator) -> tuple[DenseMatrix, np.ndarray]:
    """A matrix and the floats that it stands for."""
    weight = rng.standard_normal((k, n)).astype(np.float32)
    if kind == "float32":
        return DenseMatrix.from_floats(weight), weight
    if kind == "bfloat16":
        weight = weight.astype(ml_dtypes.bfloat16).astype(np.float32)
        return DenseMatrix.from_floats(weight), weight
    format = f"w{kind}"
    quantize = getattr(weight_only, f"quantize_{format}")
    dequantize = getattr(weight_only, f"dequantize_{format}")
    stored, scale = quantize(weight)
    found = DenseMatrix.from_integers(format, {"quant_weight": stored, "weight_scale": scale})
    return found, dequantize(stored, scale)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_rows_bits_depend_on_nothing_else(kind: str, data: st.DataObject) -> None:
    step = (1, 1) if "float" in kind else (64, 16)
    k = step[0] * data.draw(st.integers(1, 200 // step[0]))
    n = step[1] * data.draw(st.integers(1, 170 // step[1]))
    rows = data.draw(st.integers(1, 70))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    weight, floats = matrix(kind, k, n, rng)
    assert weight.core.store == kind or k * n < 4
    x = rng.standard_normal((rows, k)).astype(np.float32)
    found = multiply(x, weight, threads=1)
    exact = x.astype(np.float64) @ floats
    bound = np.abs(x).astype(np.float64) @ np.abs(floats) * k * 2.0**-23 + 1e-30
    assert np.all(np.abs(found - exact) <= bound)
    for isa in SETS:
        assert np.array_equal(multiply(x, weight, threads=3, isa=isa), found)
    first, last = sorted((data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, rows))))
    assert np.array_equal(multiply(x[first:last], weight), found[first:last])


def test_integers_stay_small_in_memory_and_bfloat16_too() -> None:
    rng = np.random.default_rng(0)
    sizes = {kind: matrix(kind, 256, 192, rng)[0].nbytes for kind in KINDS}
    weights, columns = 256 * 192, 4 * 192
    assert sizes == {
        "float32": 4 * weights,
        "bfloat16": 2 * weights,
        "int8": weights + columns,
        "int4": weights // 2 + columns,
    }


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_columns_are_the_matrixs(kind: str) -> None:
    weight, floats = matrix(kind, 37, 150, np.random.default_rng(1))
    wanted = np.array([149, 0, 63, 64, 127, 128, 0])
    np.testing.assert_array_equal(weight.columns(wanted), floats.T[wanted])
    for wrong in (-1, 150):
        with pytest.raises(ValueError, match="columns"):
            weight.columns(np.array([wrong]))


def test_wrong_arguments_are_named() -> None:
    weight, _ = matrix("int8", 64, 16, np.random.default_rng(0))
    with pytest.raises(ValueError, match="columns: of floats"):
        weight.columns(np.array([0]))
    for x in (np.zeros((2, 63), np.float32), np.zeros((2, 64)), np.zeros(64, np.float32)):
        with pytest.raises(ValueError, match="x must be"):
            multiply(x, weight)
    with pytest.raises(ValueError, match="weight must be"):
        DenseMatrix.from_floats(np.zeros((3, 4)))
    tensors = {"quant_weight": np.zeros((16, 64), np.uint8), "weight_scale": np.ones(16)}
    with pytest.raises(ValueError, match="quant_weight"):
        DenseMatrix.from_integers("wint8", tensors)
    with pytest.raises(ValueError, match="format"):
        DenseMatrix.from_integers("wint2", tensors)


class Sequences:
    """Random sequences, their rotations, and attention over them with NumPy in float64."""

    def __init__(self, heads: int, key_heads: int, dim: int, lengths: list[int]) -> None:
        rng = np.random.default_rng(0)
        self.heads, self.key_heads, self.dim = heads, key_heads, dim
        self.qkv = [
            rng.standard_normal((n, (heads + 2 * key_heads) * dim)).astype(np.float32) * 2
            for n in lengths
        ]
        angles = np.arange(max(lengths))[:, None] * 1e4 ** -(np.arange(dim // 2) / (dim // 2))
        self.cos, self.sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
        rooms = [-(-n // PLACES) * PLACES for n in lengths]
        self.bases = np.cumsum([PLACES, *rooms[:-1]])
        places = PLACES + sum(rooms)
        # What other sequences left behind must not be seen, whatever it is.
        self.keys = np.full((key_heads, places // PLACES, dim, PLACES), np.nan, np.float32)
        self.values = np.full((key_heads, places, padded(dim)), np.nan, np.float32)

    def step(self, cuts: list[tuple[int, int, int]], **options: object) -> list[np.ndarray]:
        """Attention of tokens first..last of sequences s, all in one call."""
        positions = np.concatenate([np.arange(first, last) for _, first, last in cuts])
        qkv = np.concatenate([self.qkv[s][first:last] for s, first, last in cuts])
        pieces = np.array([(last - first, first, self.bases[s]) for s, first, last in cuts])
        out = attend(
            qkv, (self.cos[positions], self.sin[positions]), pieces, self.keys, self.values,
            self.heads, **options,
        )  # fmt: skip
        return np.split(out, np.cumsum(pieces[:-1, 0]))

    def exact(self, s: int) -> np.ndarray:
        heads, key_heads, dim = self.heads, self.key_heads, self.dim
        rows = self.qkv[s].astype(np.float64).reshape(-1, heads + 2 * key_heads, dim)
        n = len(rows)
        cos, sin = self.cos[:n, None].astype(np.float64), self.sin[:n, None].astype(np.float64)
        turned, (a, b) = rows.copy(), (rows[..., 0::2], rows[..., 1::2])
        turned[..., 0::2], turned[..., 1::2] = a * cos - b * sin, a * sin + b * cos
        out = np.empty((n, heads, dim))
        for head in range(heads):
            of = heads + head // (heads // key_heads)
            scores = turned[:, head] @ turned[:, of].T / math.sqrt(dim)
            scores[np.triu_indices(n, 1)] = -np.inf
            shares = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, head] = shares / shares.sum(1, keepdims=True) @ rows[:, of + key_heads]
        return out.reshape(n, heads * dim)


@pytest.mark.parametrize(
    "heads,key_heads,dim", [(4, 2, 32), (8, 1, 16), (3, 3, 20), (10, 2, 64), (1, 1, 6)]
)
def test_attention_is_exact_and_the_same_however_it_is_cut(
    heads: int, key_heads: int, dim: int
) -> None:
    lengths = [45, 1, 17, 130]
    whole = Sequences(heads, key_heads, dim, lengths)
    found = whole.step([(s, 0, n) for s, n in enumerate(lengths)], threads=1)
    for s, rows in enumerate(found):
        exact = whole.exact(s)
        assert np.linalg.norm(rows - exact) < 2e-6 * np.linalg.norm(exact)
    for isa in SETS:
        again = Sequences(heads, key_heads, dim, lengths)
        pieces: list[list[np.ndarray]] = [[] for _ in lengths]
        done = [0] * len(lengths)
        rng = np.random.default_rng(3)
        while done != lengths:
            cuts = []
            for s, n in enumerate(lengths):
                last = min(n, done[s] + int(rng.integers(0, 60)))
                if last > done[s]:
                    cuts.append((s, done[s], last))
                    done[s] = last
            if cuts:
                for (s, _, _), rows in zip(cuts, again.step(cuts, threads=3, isa=isa), strict=True):
                    pieces[s].append(rows)
        for s, rows in enumerate(found):
            assert np.array_equal(np.concatenate(pieces[s]), rows)


def test_attention_over_equal_and_over_far_apart_scores() -> None:
    s = Sequences(1, 1, 16, [40])
    s.qkv[0][:, :16] = 0  # all scores equal: the mean of the values
    [rows] = s.step([(0, 0, 40)])
    means = np.cumsum(s.qkv[0][:, 32:], axis=0) / np.arange(1, 41)[:, None]
    np.testing.assert_allclose(rows, means, rtol=1e-5, atol=1e-6)
    s.qkv[0][:, :32] *= 1e4  # one key takes all, or another; and nothing overflows
    s.qkv[0][:, :16] = s.qkv[0][:, 16:32]
    [rows] = s.step([(0, 0, 40)])
    np.testing.assert_allclose(rows, s.exact(0), rtol=1e-5, atol=1e-6)


def test_what_is_not_a_number_stays_with_its_sequence() -> None:
    s = Sequences(4, 2, 32, [20, 20])
    clean = s.step([(0, 0, 20), (1, 0, 20)])
    s.qkv[0][5] = np.nan
    broken, other = s.step([(0, 0, 20), (1, 0, 20)])
    assert np.isnan(broken[5:]).all()
    assert np.array_equal(other, clean[1])


@pytest.mark.parametrize(
    "pieces,words",
    [
        ([(3, 0, 8)], "outside"),
        ([(3, 0, 64)], "outside"),
        ([(3, 30, 32)], "outside"),
        ([(3, -1, 0)], "outside"),
        ([(2, 0, 0)], "cover"),
        ([(4, 0, 0)], "outside"),
    ],
)
def test_no_token_is_written_outside_of_the_cache(
    pieces: list[tuple[int, int, int]], words: str
) -> None:
    keys = np.zeros((1, 4, 8, PLACES), np.float32)
    values = np.zeros((1, 64, 16), np.float32)
    qkv, half = np.zeros((3, 24), np.float32), np.zeros((3, 4), np.float32)
    with pytest.raises(ValueError, match=words):
        attend(qkv, (half, half), np.array(pieces), keys, values, 1)
    with pytest.raises(TypeError):  # never a copy of the cache
        attend(qkv, (half, half), np.array([(3, 0, 0)]), keys.astype(np.float64), values, 1)
