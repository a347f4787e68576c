# SPDX-License-Identifier: Apache-2.0
"""The calibrated search of ccq-2t for the GPU: bytes that differ from the CPU's, races.

Runs the device code on the processor (tests/cuda_host); tests/gpu/test_trellis_ldlq.py runs it on
a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from helpers.emulated_gpu import assert_same_arrays
from helpers.trellis_cases import hessian, weights
from paddle_ccq import _core
from paddle_ccq.codec import trellis
from paddle_ccq.encoder.factory import calibrated_encoder, make_encoder
from paddle_ccq.encoder.ldlq import prepare
from paddle_ccq.encoder.ldlq_metric import InputHessian
from paddle_ccq.encoder.trellis_ldlq import TRELLIS_LDLQ_RECIPES, TrellisLdlqRecipe
from paddle_ccq.encoder.trellis_metric import make_trellis_metric
from paddle_ccq.errors import CcqError
from paddle_ccq.ops import gpu_trellis_ldlq

SMALL = TrellisLdlqRecipe(window=(0, 1), beam=1000, sweeps=1)


pytestmark = pytest.mark.usefixtures("emulated_gpu")


def arguments(w: np.ndarray, h: np.ndarray, recipe: TrellisLdlqRecipe) -> list:
    prepared = prepare(w, recipe)
    metric = make_trellis_metric(h, recipe.damping)
    return [prepared.weight, metric.as_dict(), prepared.supers, recipe.as_dict()]


def assert_same(args: list) -> None:
    expected = _core.trellis_ldlq(*args, 1, "auto")
    found, _ = gpu_trellis_ldlq.trellis_ldlq(*args)
    assert_same_arrays(found, expected)


# Both orders of threads: a missing barrier makes them differ.
@pytest.mark.parametrize("order", ["0", "1"])
def test_bytes_are_the_cpus_in_any_order_of_threads(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CCQ_EMULATE_REVERSED", order)
    # Zero groups, outliers and zeros; more channels than blocks.
    assert_same(arguments(weights("awkward", 8, 192, seed=1), hessian(192, "few"), SMALL))


@pytest.mark.parametrize(
    "change",
    [
        {"sweeps": 0},
        {"sweeps": 2},
        {"kappas": (9.5, 6.0)},
        {"beam": 20000},
        {"window": (-2, 3)},
        # More local scales than there are.
        {"window": (-20, 20)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_part_of_the_recipe(change: dict) -> None:
    assert_same(
        arguments(weights("gaussian", 2, 128, seed=2), hessian(128), replace(SMALL, **change))
    )


def test_local_scales_at_their_ends() -> None:
    recipe = replace(SMALL, kappas=(15.0, 2.0), window=(-1, 1))
    assert_same(arguments(weights("far apart", 3, 192, seed=3), hessian(192), recipe))


def test_of_equal_costs_the_first_is_taken() -> None:
    assert_same(arguments(weights("steps", 3, 128, seed=4), np.eye(128), SMALL))


def test_encoder_stores_and_measures_what_the_cpu_does() -> None:
    w = weights("awkward", 8, 128, seed=5)
    known = InputHessian(hessian(128), 1000)
    uncalibrated = make_encoder(trellis.NAME, "fast", threads=1)
    cpu, gpu = (
        calibrated_encoder("fast", 1, lambda name: known, uncalibrated, device).encode(w)
        for device in ("cpu", "gpu")
    )
    for suffix, value in cpu.tensors.items():
        np.testing.assert_array_equal(gpu.tensors[suffix], value, err_msg=suffix)
    assert (gpu.stats, gpu.metrics) == (cpu.stats, cpu.metrics)


def test_a_full_device_is_refused_in_one_line_and_the_next_call_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = arguments(weights("gaussian", 1, 64, seed=6), hessian(64), replace(SMALL, sweeps=0))
    monkeypatch.setenv("CCQ_EMULATE_MEMORY", str(1 << 20))
    with pytest.raises(CcqError, match="encoding on the GPU failed: out of memory"):
        gpu_trellis_ldlq.trellis_ldlq(
            *arguments(weights("gaussian", 1, 640), np.eye(640), replace(SMALL, sweeps=0))
        )
    monkeypatch.delenv("CCQ_EMULATE_MEMORY")
    assert_same(args)
    held = gpu_trellis_ldlq.held_bytes()
    assert_same(args)
    assert gpu_trellis_ldlq.held_bytes() == held > 0


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, np.zeros((2, 96), np.float32), r"weight must be float32 \[N, K\] with 64 \| K"),
        (0, np.zeros((2, 64)), "weight must be a float32 array, got float64"),
        (2, np.zeros((1, 3), np.float32), r"supers must be \[candidates, 2\], got \[1, 3\]"),
    ],
)
def test_wrong_arrays_are_named(index: int, value: np.ndarray, message: str) -> None:
    args = arguments(weights("gaussian", 2, 64), hessian(64), SMALL)
    args[index] = value
    with pytest.raises(ValueError, match=message):
        gpu_trellis_ldlq.trellis_ldlq(*args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beam": 1 << 22}, "beam must be 0 to 4194303, got 4194304"),
        ({"window_low": 1}, "the window must hold 0"),
        ({"sweeps": -1}, "sweeps be at least 0"),
    ],
)
def test_wrong_numbers_are_named(change: dict, message: str) -> None:
    args = arguments(weights("gaussian", 2, 64), hessian(64), SMALL)
    args[3] = {**args[3], **change}
    with pytest.raises(ValueError, match=message):
        gpu_trellis_ldlq.trellis_ldlq(*args)


def test_a_metric_of_another_size_is_named() -> None:
    args = arguments(weights("gaussian", 2, 64), hessian(64), SMALL)
    args[1] = make_trellis_metric(hessian(128), 0.01).as_dict()
    with pytest.raises(ValueError, match=r"h must be \[64, 64\], got \[128, 128\]"):
        gpu_trellis_ldlq.trellis_ldlq(*args)


def test_every_preset_is_within_what_the_search_takes() -> None:
    for recipe in TRELLIS_LDLQ_RECIPES.values():
        assert recipe.window[0] <= 0 <= recipe.window[1]
        assert recipe.beam <= gpu_trellis_ldlq.MAX_BEAM
