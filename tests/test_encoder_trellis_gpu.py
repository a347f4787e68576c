# SPDX-License-Identifier: Apache-2.0
"""The search of ccq-2t for the GPU: bytes that differ from the CPU's, races, unclear errors.

Runs the device code on the processor (tests/cuda_host); tests/gpu/test_trellis.py runs it on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.configs import CALIBRATED
from helpers.emulated_gpu import assert_same_arrays
from helpers.runs import contents
from helpers.trellis_cases import NARROW, WIDE, weights
from paddle_ccq import _core
from paddle_ccq.codec import trellis
from paddle_ccq.encoder.factory import make_encoder
from paddle_ccq.encoder.recipes import TRELLIS_RECIPES, TrellisRecipe
from paddle_ccq.errors import CcqError
from paddle_ccq.ops import gpu_trellis
from paddle_ccq.quantize import quantize

MEGABYTES = 1 << 20


pytestmark = pytest.mark.usefixtures("emulated_gpu")


def assert_same(w: np.ndarray, recipe: TrellisRecipe, **options: int) -> None:
    expected = _core.trellis(w, recipe.as_dict(), 1, "auto")
    found, _ = gpu_trellis.trellis(w, recipe.as_dict(), **options)
    assert_same_arrays(found, expected)


# Both orders of threads: a missing barrier makes them differ.
@pytest.mark.parametrize("order", ["0", "1"])
def test_bytes_are_the_cpus_in_any_order_of_threads(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CCQ_EMULATE_REVERSED", order)
    assert_same(weights("awkward", 9, 192, seed=1), TRELLIS_RECIPES["default"])


@pytest.mark.parametrize("kind", ["steps", "far apart"])
def test_equal_costs_and_the_change_of_units_between_groups(kind: str) -> None:
    assert_same(weights(kind, 16, 192, seed=2), replace(TRELLIS_RECIPES["default"], beam=20000))


@pytest.mark.parametrize("recipe", [NARROW, WIDE], ids=["narrow", "wide"])
def test_beams_and_super_scales(recipe: TrellisRecipe) -> None:
    # Two super scales: a block holds channels of both.
    assert_same(weights("awkward", 8, 128, seed=3), recipe)


@pytest.mark.parametrize("window", [(-2, 3), (-7, 7)])
def test_windows_that_do_not_divide_a_block(window: tuple[int, int]) -> None:
    assert_same(weights("gaussian", 3, 64, seed=4), replace(NARROW, window=window, beam=9000))


def test_more_channels_than_blocks_and_little_memory() -> None:
    # Sixteen channels a block; two blocks at most are at work, with little memory one.
    w = weights("gaussian", 37, 64, seed=5)
    recipe = replace(NARROW, window=(-1, 2))
    assert_same(w, recipe)
    assert_same(w, recipe, run_bytes=700_000)
    with pytest.raises(ValueError, match="run_bytes 600000: too little"):
        gpu_trellis.trellis(w, recipe.as_dict(), run_bytes=600_000)


def test_a_full_device_is_tried_with_less_and_then_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = replace(NARROW, window=(0, 14))
    assert_same(weights("gaussian", 1, 64), recipe)  # whatever every call needs
    held = gpu_trellis.held_bytes()
    # Four channels a block, and two blocks of 590,000 bytes, until there is memory for only one.
    monkeypatch.setenv("CCQ_EMULATE_MEMORY", str(held + 300_000))
    assert_same(weights("gaussian", 8, 128), recipe, run_bytes=2 * MEGABYTES)
    assert gpu_trellis.held_bytes() < held + 300_000
    monkeypatch.setenv("CCQ_EMULATE_MEMORY", str(MEGABYTES))
    with pytest.raises(CcqError, match="encoding on the GPU failed: out of memory"):
        gpu_trellis.trellis(weights("gaussian", 2, 64 * 2048), recipe.as_dict())
    monkeypatch.delenv("CCQ_EMULATE_MEMORY")
    assert_same(weights("gaussian", 1, 64), recipe)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((4, 96), np.float32), r"weight must be float32 \[N, K\] with 64 \| K"),
        (np.zeros((0, 64), np.float32), r"with 64 \| K, got \[0, 64\]"),
        (np.zeros((4, 128)), r"weight must be a float32 array, got float64"),
        (np.zeros(128, np.float32), r"with 64 \| K, got \[128\]"),
    ],
)
def test_wrong_arrays_are_named(value: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpu_trellis.trellis(value, NARROW.as_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_high": 15}, "local scales must be 1 to 15, got 16"),
        ({"window_high": -1}, "local scales must be 1 to 15, got 0"),
        ({"beam": 65535}, "beam must be 0 to 65534, got 65535"),
        ({"kappas": ()}, "kappas must be 1 to 8, got 0"),
    ],
)
def test_wrong_numbers_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpu_trellis.trellis(weights("gaussian", 2, 64), {**NARROW.as_dict(), **change})


def test_encoder_stores_and_measures_what_the_cpu_does() -> None:
    w = weights("awkward", 8, 128, seed=6)
    cpu, gpu = (
        make_encoder(trellis.NAME, "fast", threads=1, device=device).encode(w)
        for device in ("cpu", "gpu")
    )
    for suffix, value in cpu.tensors.items():
        np.testing.assert_array_equal(gpu.tensors[suffix], value, err_msg=suffix)
    assert gpu.stats == cpu.stats


def test_quantize_on_the_gpu_searches_there_and_writes_the_cpus_files(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search itself is the tests' above; an emulated one would take minutes for a model."""
    searched = []

    def search(weight: np.ndarray, recipe: dict) -> tuple[dict[str, np.ndarray], float]:
        searched.append(weight.shape)
        return _core.trellis(weight, recipe, 1, "auto"), 1.0

    monkeypatch.setattr(gpu_trellis, "trellis", search)
    model = tiny_model(CALIBRATED)
    options = {"preset": "fast", "quiet": True, "format": trellis.NAME}
    quantize(model, tmp_path / "cpu", **options)
    assert not searched
    quantize(model, tmp_path / "gpu", device="gpu", **options)
    # Two layers of two experts of two matrices each.
    assert len(searched) == 8
    assert contents(tmp_path / "gpu") == contents(tmp_path / "cpu")
