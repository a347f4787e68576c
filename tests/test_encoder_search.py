# SPDX-License-Identifier: Apache-2.0
"""The search: core and NumPy reference disagree, bytes depend on the machine, error grows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_ccq import _core
from paddle_ccq.codec import formats, wint2
from paddle_ccq.encoder import layouts, recipes, reference
from paddle_ccq.encoder.base import ErrorStats
from paddle_ccq.encoder.factory import make_encoder
from paddle_ccq.encoder.search import SearchEncoder, pair_books

FORMATS = list(layouts.LAYOUTS)
ARRAYS = ("words", "scales", "supers", "pairs")


def run_core(
    weight: np.ndarray, format: str, recipe: recipes.Recipe, threads: int = 1, isa: str = "auto"
) -> dict[str, np.ndarray]:
    layout = layouts.LAYOUTS[format]
    return _core.encode(
        np.ascontiguousarray(weight, np.float32),
        pair_books(format, recipe),
        list(layout.index_bits),
        layout.as_dict(),
        recipe.as_dict(),
        threads,
        isa,
    )


def shorten(recipe: recipes.Recipe) -> recipes.Recipe:
    """Few enough candidates for the slow reference, all stages still in use."""
    return dataclasses.replace(
        recipe,
        kappas=recipe.kappas[:2],
        code_pairs=min(recipe.code_pairs, 4),
        keep_pairs=min(recipe.keep_pairs, 2),
    )


def weights(kind: str, n: int, k: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, k)).astype(np.float32) * np.float32(0.02)
    if kind == "outliers":
        w[rng.random((n, k)) < 0.02] *= 50
    elif kind == "uneven groups":
        w *= np.repeat(rng.lognormal(0, 2, (n, k // 64)), 64, axis=1).astype(np.float32)
    elif kind == "zero groups":
        w[:, :64] = 0
        w[0] = 0
    elif kind == "tiny":
        w *= np.float32(1e-29)
    elif kind == "huge":
        w *= np.float32(1e37)
    return w


KINDS = ["gaussian", "outliers", "uneven groups", "zero groups", "tiny", "huge"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_core_equals_numpy_reference_bit_for_bit(format: str, kind: str) -> None:
    recipe = shorten(recipes.RECIPES[format]["default"])
    w = weights(kind, 2, 128, seed=3)
    found = run_core(w, format, recipe)
    expected = reference.encode(w, layouts.LAYOUTS[format], recipe, pair_books(format, recipe))
    for name in ARRAYS:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", [i for i in _core.instruction_sets() if i != "plain"])
def test_every_instruction_set_and_thread_count_gives_the_same_bytes(format: str, isa: str) -> None:
    recipe = recipes.RECIPES[format]["default"]
    w = np.concatenate([weights(kind, 3, 256, seed=5) for kind in KINDS])
    plain = run_core(w, format, recipe, threads=1, isa="plain")
    other = run_core(w, format, recipe, threads=3, isa=isa)
    for name in (*ARRAYS, "sums"):
        np.testing.assert_array_equal(plain[name], other[name], err_msg=name)


def test_an_instruction_set_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="no instruction set"):
        run_core(np.zeros((1, 128)), "wint2", recipes.RECIPES["wint2"]["fast"], isa="sse9")


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(FORMATS), st.sampled_from(KINDS))
def test_reported_error_is_the_decoders_error(seed: int, format: str, kind: str) -> None:
    w = weights(kind, 8, 256, seed)
    encoded = make_encoder(format, "fast", threads=1).encode(w)
    back = formats.decode(format, encoded.tensors, dtype="float32").T
    assert np.all(np.isfinite(back))
    stats = ErrorStats.between(w, back)
    assert encoded.stats.rel_mse == pytest.approx(stats.rel_mse, rel=1e-6, abs=1e-12)
    assert encoded.stats.cosine == pytest.approx(stats.cosine, rel=1e-6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("preset", ["fast", "default", "best"])
def test_tensors_match_the_formats_specs(format: str, preset: str) -> None:
    encoded = make_encoder(format, preset).encode(weights("gaussian", 16, 256, seed=0))
    specs = formats.tensor_specs(format, 256, 16)
    assert set(encoded.tensors) == set(specs)
    for suffix, (shape, dtype) in specs.items():
        assert encoded.tensors[suffix].shape == shape
        assert encoded.tensors[suffix].dtype == formats.SAFETENSORS_DTYPES[dtype]


def test_each_word_is_the_nearest_of_the_256() -> None:
    # An oracle that shares no arithmetic with the search: float64 distances at the chosen scales.
    w = weights("gaussian", 8, 256, seed=11)
    tensors = make_encoder("wint2", "default").encode(w).tensors
    t = wint2.Wint2Tensors(**tensors)
    scales = wint2.unpack_scales(t.weight_scale) * t.super_scales.astype(np.float64)
    for n in range(8):
        book = wint2.codebook(t.code_scale[n], t.code_zp[n]).astype(np.float64)
        for g in range(4):
            v = w[n, 64 * g : 64 * g + 64].reshape(16, 4).astype(np.float64)
            distance = ((v[:, None] - scales[g, n] * book) ** 2).sum(-1)
            chosen = distance[np.arange(16), t.quant_weight[16 * g : 16 * g + 16, n]]
            # Fixed point may pick another among two that are equally far to 1 part in 10^4.
            assert np.all(chosen <= distance.min(axis=1) * (1 + 1e-3) + scales[g, n] ** 2 * 1e-2)


def test_all_pairs_stay_inside_15_bits() -> None:
    zps = np.array(recipes.CODE_ZERO_POINTS, np.float32)
    low, high = wint2.code_range(np.full_like(zps, recipes.CODE_SCALE), zps)
    assert low.min() >= 0 and high.max() <= wint2.CODE_MAX
    assert len(set(recipes.CODE_ZERO_POINTS)) == 64


# Ceilings on a 64-channel sample; the published table is made by benchmarks/encoder_error.py.
@pytest.mark.parametrize(
    "format,preset,ceiling",
    [
        ("wint2", "fast", 0.1055),
        ("wint2", "default", 0.1037),
        ("wint2", "best", 0.1030),
        ("ccq-2.75", "default", 0.0783),
        ("ccq-2.5", "default", 0.0950),
    ],
)
def test_gaussian_error_stays_in_its_class(format: str, preset: str, ceiling: float) -> None:
    w = np.random.default_rng(17).standard_normal((64, 4096)).astype(np.float32)
    assert make_encoder(format, preset).encode(w).stats.rel_mse < ceiling


def test_presets_trade_time_for_error() -> None:
    w = np.random.default_rng(1).standard_t(5, (32, 1024)).astype(np.float32)
    for format in FORMATS:
        errors = [
            make_encoder(format, preset).encode(w).stats.rel_mse
            for preset in ("fast", "default", "best")
        ]
        assert errors[0] > errors[1] > errors[2] * 0.9999


def test_scaling_a_channel_by_a_power_of_two_scales_only_its_super_scale() -> None:
    w = weights("gaussian", 8, 256, seed=2)
    encoder = SearchEncoder("wint2", "default", threads=1)
    a, b = encoder.encode(w).tensors, encoder.encode(w * 8).tensors
    for suffix in ("quant_weight", "weight_scale", "code_zp"):
        np.testing.assert_array_equal(a[suffix], b[suffix])
    np.testing.assert_array_equal(
        a["super_scales"].astype(np.float32) * 8, b["super_scales"].astype(np.float32)
    )


def test_shapes_and_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 128, got 192"):
        make_encoder("wint2").encode(np.zeros((8, 192), np.float32))
    for bad in ({"format": "wint3"}, {"format": "wint2", "preset": "slow"}):
        with pytest.raises(ValueError, match=r"unknown|no encoder"):
            make_encoder(**bad)
    with pytest.raises(ValueError, match="unknown encoder"):
        make_encoder("wint2", encoder="magic")
