# SPDX-License-Identifier: Apache-2.0
"""Calibrated ccq-2t: bytes that depend on the machine, feedback that feeds back something else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from paddle_ccq import _core
from paddle_ccq.codec import formats, trellis
from paddle_ccq.encoder import trellis_ldlq_reference as reference
from paddle_ccq.encoder.factory import calibrated_encoder, make_encoder
from paddle_ccq.encoder.ldlq import LdlqEncoder, prepare
from paddle_ccq.encoder.ldlq_metric import InputHessian, damped, make_metric, weighted_error
from paddle_ccq.encoder.trellis_ldlq import (
    TRELLIS_LDLQ_RECIPES,
    TrellisLdlqEncoder,
    TrellisLdlqRecipe,
)
from paddle_ccq.encoder.trellis_metric import make_trellis_metric

SMALL = TrellisLdlqRecipe(kappas=(9.5, 6.0), window=(-1, 1), beam=1000, sweeps=2)


def gaussian(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def autoregressive(k: int, rho: float = 0.9) -> np.ndarray:
    return rho ** np.abs(np.subtract.outer(np.arange(k), np.arange(k)))


def lopsided(k: int, seed: int) -> np.ndarray:
    """A Hessian of few directions, with inputs of very different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((k // 4, k)) * rng.lognormal(0, 1, k)
    return x.T @ x / len(x)


def encoder(hessian: np.ndarray, recipe: TrellisLdlqRecipe, isa: str = "auto", threads: int = 1):
    data_free = make_encoder(trellis.NAME, "fast", threads=threads)
    known = InputHessian(hessian, 100)
    return TrellisLdlqEncoder("fast", threads, lambda _: known, data_free, isa=isa, recipe=recipe)


def proxy(weight: np.ndarray, tensors: dict, hessian: np.ndarray) -> float:
    decoded = formats.decode(trellis.NAME, tensors, "float32").T
    return weighted_error(weight - decoded, hessian) / weighted_error(weight, hessian)


@pytest.mark.parametrize("make", [autoregressive, lambda k: lopsided(k, 1)], ids=["ar", "lopsided"])
def test_every_instruction_set_and_thread_count_finds_the_same(make) -> None:
    hessian, w = make(256), gaussian(19, 256, seed=1)
    w[2, 64:128] = 0
    w[3] = 0
    w[4, :64] *= 1e-4
    w[5, 10] = 50
    w[6] *= 1e20
    expected = encoder(hessian, SMALL).encode(w).tensors
    for isa in _core.instruction_sets():
        for threads in (1, 3):
            found = encoder(hessian, SMALL, isa, threads).encode(w).tensors
            for suffix, value in expected.items():
                np.testing.assert_array_equal(found[suffix], value, err_msg=f"{suffix}, {isa}")
    # Channels do not see each other: one alone gives the bytes that it gives among others.
    alone = encoder(hessian, SMALL).encode(w[7:8]).tensors["quant_weight"]
    np.testing.assert_array_equal(alone[:, 0], expected["quant_weight"][:, 7])


@pytest.mark.parametrize("make", [autoregressive, lambda k: lopsided(k, 2)], ids=["ar", "lopsided"])
@pytest.mark.parametrize("sweeps", [0, 2])
def test_the_core_does_what_the_reference_does(make, sweeps: int) -> None:
    hessian, w = make(192), gaussian(4, 192, seed=7)
    w[1, 64:128] = 0
    w[2, 128:] *= 1e-3
    w[3, 100] = 20
    recipe = TrellisLdlqRecipe(kappas=(9.5, 6.0), window=(-1, 1), beam=300, sweeps=sweeps)
    metric, prepared = make_trellis_metric(hessian, 0.01), prepare(w, recipe)
    expected = reference.encode(prepared.weight, metric, prepared.supers, recipe)
    found = _core.trellis_ldlq(
        prepared.weight, metric.as_dict(), prepared.supers, recipe.as_dict(), 1
    )
    for part, value in expected.items():
        np.testing.assert_array_equal(found[part], value, err_msg=part)


def test_feedback_beats_the_memoryless_code_by_a_fifth() -> None:
    hessian, w = autoregressive(512), gaussian(8, 512, seed=2)
    wint2 = LdlqEncoder("default", 1, lambda _: None, make_encoder("wint2"))
    tensors = wint2.search(w, make_metric(hessian, 0.01))
    decoded = formats.decode("wint2", tensors, "float32").T
    memoryless = weighted_error(w - decoded, hessian) / weighted_error(w, hessian)
    found = encoder(hessian, TRELLIS_LDLQ_RECIPES["default"]).encode(w)
    assert proxy(w, found.tensors, hessian) < 0.82 * memoryless
    data_free = make_encoder(trellis.NAME, "default", threads=1).encode(w)
    assert proxy(w, found.tensors, hessian) < 0.25 * proxy(w, data_free.tensors, hessian)


def test_sweeps_lower_the_loss_and_the_loss_is_the_weighted_error() -> None:
    hessian, w = lopsided(256, seed=3), gaussian(6, 256, seed=4)
    metric = make_trellis_metric(hessian, 0.01)
    losses = []
    for sweeps in (0, 1, 4):
        recipe = TrellisLdlqRecipe(window=(-1, 2), beam=1500, sweeps=sweeps)
        prepared = prepare(w, recipe)
        found = _core.trellis_ldlq(
            prepared.weight, metric.as_dict(), prepared.supers, recipe.as_dict(), 1
        )
        decoded = formats.decode(
            trellis.NAME, encoder(hessian, recipe).search(w, metric), "float32"
        ).T
        scale = np.ldexp(1.0, -prepared.exponents)[:, None]
        h = damped(hessian, 0.01)
        exact = np.array([weighted_error(row[None], h) for row in (w - decoded) * scale])
        # Without sweeps the loss is the search's own, in whole units of a block.
        np.testing.assert_allclose(found["loss"], exact, rtol=1e-3 if sweeps else 0.03)
        losses.append(exact.sum())
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("preset", TRELLIS_LDLQ_RECIPES)
def test_one_input_that_outweighs_all_others_is_met(preset: str) -> None:
    rng = np.random.default_rng(8)
    x = rng.standard_normal((2000, 128)) / 2
    x[:, 104] *= 19
    x[:, 126] *= 4
    hessian, w = x.T @ x / len(x), gaussian(16, 128, seed=9)
    w[:, 104], w[:, 126] = 4.4, -4.4
    recipe = TRELLIS_LDLQ_RECIPES[preset]
    found = proxy(w, encoder(hessian, recipe).encode(w).tensors, hessian)
    # Without sweeps the weight stays beyond what its group's scale reaches.
    without = dataclasses.replace(recipe, window=(0, 1), sweeps=0)
    assert found < 0.02
    assert found < 0.3 * proxy(w, encoder(hessian, without).encode(w).tensors, hessian)


def test_an_identity_hessian_costs_little_more_than_no_data() -> None:
    w = gaussian(8, 512, seed=5)
    free = make_encoder(trellis.NAME, "default", threads=1).encode(w).stats.rel_mse
    found = encoder(np.eye(512), TRELLIS_LDLQ_RECIPES["default"]).encode(w).stats.rel_mse
    assert abs(found / free - 1) < 0.02


def test_the_factors_are_those_of_the_hessian() -> None:
    hessian = lopsided(192, seed=6)
    metric = make_trellis_metric(hessian, 0.01)
    h = damped(hessian, 0.01)

    def product(m: np.ndarray, root: np.ndarray, unit: np.ndarray) -> np.ndarray:
        count = len(unit)
        d = np.zeros((4 * count, 4 * count))
        for b in range(count):
            r = root[b].astype(np.float64)
            d[4 * b : 4 * b + 4, 4 * b : 4 * b + 4] = unit[b] * (r @ r.T)
        return m.astype(np.float64) @ d @ m.T.astype(np.float64)

    np.testing.assert_allclose(product(metric.m, metric.root, metric.unit), h, atol=1e-4)
    np.testing.assert_allclose(np.square(metric.root).sum(axis=(1, 2)), 1, rtol=1e-5)
    for g, rows in ((0, 68), (1, 68), (2, 64)):
        own = h[64 * g : 64 * g + rows, 64 * g : 64 * g + rows]
        found = product(
            metric.window_m[g, :rows, :rows],
            metric.window_root[g, : rows // 4],
            metric.window_unit[g, : rows // 4],
        )
        np.testing.assert_allclose(found, own, atol=1e-4)
        inverse = metric.window_inverse[g, :rows, :rows].astype(np.float64)
        np.testing.assert_allclose(inverse @ own, np.eye(rows), atol=1e-2)


def test_matrices_without_statistics_are_encoded_without_data() -> None:
    w = gaussian(4, 128)
    data_free = make_encoder(trellis.NAME, "fast", threads=1)
    made = calibrated_encoder("fast", 1, lambda _: None, data_free).encode(w)
    assert made.metrics == {"calibration_tokens": 0}
    np.testing.assert_array_equal(
        made.tensors["quant_weight"], data_free.encode(w).tensors["quant_weight"]
    )
