# SPDX-License-Identifier: Apache-2.0
"""The search of ccq-2t: bytes that depend on the machine, bad choices, weights that break it."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq import _core
from paddle_ccq.codec import formats, trellis
from paddle_ccq.encoder import trellis_reference
from paddle_ccq.encoder.base import PRESETS
from paddle_ccq.encoder.factory import make_encoder
from paddle_ccq.encoder.recipes import TRELLIS_RECIPES, TrellisRecipe
from paddle_ccq.encoder.trellis import TrellisEncoder, pack
from paddle_ccq.errors import CcqError
from paddle_ccq.quantize import quantize

WIDE = TrellisRecipe(1 / 104.5, (9.5, 5.0), (-1, 1), beam=(1 << 22) - 1)
NARROW = TrellisRecipe(1 / 104.5, (9.5,), (0, 1), beam=3000)


def gaussian(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def awkward(seed: int) -> np.ndarray:
    """Channels with zero groups, tiny groups, outliers, tiny and huge scales, and only zeros."""
    w = gaussian(8, 384, seed)
    w[0, 64:192] = 0
    w[1, :64] *= 1e-3
    w[1, 320:] *= 0.03
    w[2, 200] = 60
    w[3] *= 1e-29
    w[4] *= 1e-36
    w[5] *= 1e30
    w[6] = 0
    w[7] = np.sign(w[7]) * np.abs(w[7]) ** 4
    return w


def search(w: np.ndarray, recipe: TrellisRecipe, isa: str, threads: int = 1) -> dict:
    return _core.trellis(w, recipe.as_dict(), threads, isa)


@pytest.mark.parametrize("recipe", [WIDE, NARROW, TRELLIS_RECIPES["default"]], ids=str)
def test_every_instruction_set_and_thread_count_does_what_the_reference_does(
    recipe: TrellisRecipe,
) -> None:
    w = awkward(seed=recipe.beam % 1000)
    expected = trellis_reference.encode(w, recipe)
    for isa in _core.instruction_sets():
        for threads in (1, 3):
            found = search(w, recipe, isa, threads)
            for part, value in expected.items():
                np.testing.assert_array_equal(found[part], value, err_msg=f"{part}, {isa}")


def test_the_statistics_are_those_of_the_decoder() -> None:
    w = awkward(seed=2)[[0, 1, 2, 7]]
    found = search(w, NARROW, "auto")
    decoded = formats.decode(trellis.NAME, pack(found), "float32").T.astype(np.float64)
    exact = w.astype(np.float64)
    expected = np.stack(
        [(exact * exact).sum(1), (exact * decoded).sum(1), (decoded * decoded).sum(1)], axis=1
    )
    np.testing.assert_allclose(found["sums"], expected, rtol=1e-12)


def test_with_all_survivors_kept_no_byte_can_be_changed_for_the_better() -> None:
    w = gaussian(2, 128, seed=3)
    found = search(w, WIDE, "auto")
    book = trellis.codebook().astype(np.int64)
    for channel, super_scale in enumerate(found["supers"]):
        words = found["words"][channel].reshape(-1).astype(int)
        local = found["scales"][channel].astype(int)
        scales = local.astype(np.float32) * super_scale
        groups = w[channel].reshape(-1, 64)
        u = [trellis_reference.fixed_point(*pair) for pair in zip(groups, scales, strict=True)]
        u = np.concatenate(u).reshape(-1, 1, 4)
        square = np.repeat(local**2, 16)
        before = np.concatenate([[0], words[:-1]])
        for i in range(len(words) - 1):
            own = square[i] * np.square(u[i] - book[before[i]]).sum(axis=-1)
            following = np.square(u[i + 1] - book[:, words[i + 1]]).sum(axis=-1)
            cost = own + square[i + 1] * following
            # At a border of groups costs are rounded to the next group's units.
            slack = local.max() ** 2 if (i + 1) % 16 == 0 else 0
            assert cost[words[i]] <= cost.min() + slack


@pytest.mark.parametrize("preset,bound", [("fast", 0.0755), ("default", 0.0742), ("best", 0.0738)])
def test_error_on_gaussian_weights(preset: str, bound: float) -> None:
    encoded = make_encoder(trellis.NAME, preset, threads=2).encode(gaussian(8, 2048, seed=4))
    assert encoded.stats.rel_mse < bound
    decoded = formats.decode(trellis.NAME, encoded.tensors, "float32").T
    error = np.square(decoded - gaussian(8, 2048, seed=4)).sum()
    assert abs(error / encoded.stats.energy - encoded.stats.rel_mse) < 1e-6


def test_a_wider_search_is_not_worse() -> None:
    w = gaussian(6, 1024, seed=5)
    errors = [make_encoder(trellis.NAME, preset, threads=2).encode(w).stats for preset in PRESETS]
    assert errors[0].rel_mse > errors[1].rel_mse > errors[2].rel_mse


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.floats(-20, 20), st.integers(0, 2**32 - 1))
def test_a_power_of_two_changes_nothing_but_the_super_scale(
    n: int, pairs: int, exponent: float, seed: int
) -> None:
    w = gaussian(n, 128 * pairs, seed)
    factor = np.float32(2.0 ** round(exponent))
    one, other = search(w, NARROW, "auto"), search(w * factor, NARROW, "auto")
    np.testing.assert_array_equal(one["words"], other["words"])
    np.testing.assert_array_equal(one["scales"], other["scales"])
    np.testing.assert_array_equal(one["supers"] * factor, other["supers"])


def test_zeros_and_what_is_too_small_are_stored_as_zeros() -> None:
    w = awkward(seed=6)
    tensors = make_encoder(trellis.NAME, "fast", threads=1).encode(w).tensors
    decoded = formats.decode(trellis.NAME, tensors, "float32").T
    assert not decoded[0, 64:192].any() and not decoded[6].any() and not decoded[4].any()
    assert not decoded[1, :64].any() and decoded[1, 320:].any()
    # Behind a group of zeros the chain begins anew.
    assert not tensors["quant_weight"][16:48, 0].any()
    error = np.square((decoded - w)[[0, 5]], dtype=np.float64).sum(1)
    assert np.all(error < 0.085 * np.square(w[[0, 5]], dtype=np.float64).sum(1))


def test_what_cannot_be_stored_or_searched_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ccq-2t needs K .* a multiple of 128, got 192"):
        make_encoder(trellis.NAME, "fast").encode(gaussian(2, 192))
    with pytest.raises(ValueError, match="the paper has no ccq-2t"):
        make_encoder(trellis.NAME, encoder="paper")
    with pytest.raises(ValueError, match="no instruction set mmx"):
        TrellisEncoder("fast", 1, isa="mmx").encode(gaussian(2, 128))


@pytest.mark.parametrize("name", ["paper", "paper-literal"])
def test_the_papers_encoders_are_refused_before_any_work(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / "float", tiny_config())
    with pytest.raises(CcqError, match=f"--encoder {name}: the paper has no ccq-2t"):
        quantize(tmp_path / "float", tmp_path / "out", format="ccq-2t", encoder=name, quiet=True)
    assert not (tmp_path / "out").exists()


def test_tensors_have_the_layout_of_the_format() -> None:
    encoded = make_encoder(trellis.NAME, "fast", threads=1).encode(gaussian(5, 256))
    t = trellis.TrellisTensors(**encoded.tensors)
    assert t.shape == (256, 5)
    assert t.super_scales.dtype == ml_dtypes.bfloat16
