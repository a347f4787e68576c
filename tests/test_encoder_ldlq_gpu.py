# SPDX-License-Identifier: Apache-2.0
"""The calibrated search for the GPU: bytes that differ from the CPU's, races, unclear errors.

Runs the device code on the processor (tests/cuda_host); tests/gpu/test_ldlq.py runs it on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.configs import CALIBRATED
from helpers.emulated_gpu import assert_same_arrays
from helpers.ldlq_cases import KINDS, SMALL, arguments, hessian, odd_weights, weights
from helpers.runs import contents
from paddle_ccq import _core, sensitivity
from paddle_ccq.encoder import ldlq
from paddle_ccq.encoder.factory import calibrated_encoder, make_encoder
from paddle_ccq.encoder.ldlq_metric import InputHessian, make_metric
from paddle_ccq.errors import CcqError
from paddle_ccq.ops import gpu_ldlq, gpu_library
from paddle_ccq.quantize import main, quantize

MEGABYTES = 1 << 20


pytestmark = pytest.mark.usefixtures("emulated_gpu")


def assert_same(args: list, run_bytes: int = 64 * MEGABYTES) -> None:
    expected = _core.ldlq(*args, 1, "auto")
    found, _ = gpu_ldlq.ldlq(*args, run_bytes=run_bytes)
    assert_same_arrays(found, expected)


# Both orders of threads: a missing barrier makes them differ.
@pytest.mark.parametrize("order", ["0", "1"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_the_cpus_in_any_order_of_threads(
    kind: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CCQ_EMULATE_REVERSED", order)
    # 320 rows: a whole panel and a part of one; 37 channels fill no block.
    assert_same(arguments(odd_weights(37, 320, seed=37), hessian(320, kind), SMALL))


@pytest.mark.parametrize("preset", ["fast", "default", "best"])
def test_every_preset(preset: str) -> None:
    assert_same(arguments(odd_weights(13, 128, seed=13), hessian(128), ldlq.LDLQ_RECIPES[preset]))


def test_more_than_one_panel_before_and_behind() -> None:
    recipe = replace(SMALL, code_pairs=2, keep_pairs=1, sweeps=1)
    assert_same(arguments(odd_weights(9, 832, seed=9), hessian(832, "low rank"), recipe))


@pytest.mark.parametrize("window", [(0, 0), (0, 1), (-1, 3), (-3, 3), (-3, 4)])
def test_every_number_of_local_scales(window: tuple[int, int]) -> None:
    recipe = replace(SMALL, window=window, sweeps=1)
    assert_same(arguments(odd_weights(40, 128, seed=40), hessian(128), recipe))


@pytest.mark.parametrize(
    "change",
    [{"sweeps": 0}, {"keep_pairs": 5}, {"kappas": (9.0,)}, {"damping": 1e-9}],
    ids=lambda change: next(iter(change)),
)
def test_steps_that_are_left_out_and_a_bad_metric(change: dict) -> None:
    assert_same(
        arguments(
            odd_weights(24, 128, seed=24), hessian(128, "few tokens"), replace(SMALL, **change)
        )
    )


def test_of_equal_entries_the_first_is_taken() -> None:
    args = arguments(odd_weights(24, 128, seed=24), np.eye(128), SMALL)
    # Eight vectors for 256 bytes: equal ones in every thread, next to each other and far apart.
    args[2] = np.ascontiguousarray(args[2][:, :, (np.arange(256) >> 4 & 7) * 31])
    assert_same(args)


def test_little_memory_takes_fewer_channels_at_a_time() -> None:
    args = arguments(odd_weights(300, 128, seed=300), hessian(128), replace(SMALL, sweeps=1))
    with pytest.raises(ValueError, match="run_bytes 100000: too little"):
        assert_same(args, 100_000)
    assert_same(args, 450_000)


def test_a_full_device_is_tried_with_less_and_then_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert_same(arguments(weights(5, 128), hessian(128), SMALL))  # whatever every call needs
    # 12,800 lanes of 1,361 bytes, for one group and without a second half.
    recipe = replace(SMALL, code_pairs=64, keep_pairs=1, window=(0, 0), kappas=(9.0,), sweeps=0)
    args = arguments(weights(200, 64), np.eye(64), recipe)
    monkeypatch.setenv("CCQ_EMULATE_MEMORY", str(gpu_ldlq.held_bytes() + 16 * MEGABYTES))
    before = gpu_ldlq.held_bytes()
    assert_same(args, 32 * MEGABYTES)
    assert gpu_ldlq.held_bytes() - before < 16 * MEGABYTES
    monkeypatch.setenv("CCQ_EMULATE_MEMORY", str(MEGABYTES))
    with pytest.raises(CcqError, match="encoding on the GPU failed: out of memory"):
        gpu_ldlq.ldlq(*arguments(weights(8, 2048), np.eye(2048), SMALL))


def test_matrices_after_another_use_the_memory_of_the_first() -> None:
    args = arguments(weights(40, 256), hessian(256), SMALL)
    assert_same(args)
    held = gpu_ldlq.held_bytes()
    assert_same(arguments(weights(7, 128), hessian(128), SMALL))
    assert_same(args)
    assert gpu_ldlq.held_bytes() == held


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, np.zeros((4, 96), np.float32), r"weight must be float32 \[N, K\] with 64 \| K"),
        (0, np.zeros((4, 128)), "weight must be a float32 array, got float64"),
        (2, np.zeros((2, 4, 255), np.float32), r"books must be \[2, 4, 256\]"),
        (3, np.zeros((2, 5), np.float32), r"supers must be \[2, 4\], got \[2, 5\]"),
    ],
)
def test_wrong_arrays_are_named(index: int, value: np.ndarray, message: str) -> None:
    args = arguments(weights(4, 128), hessian(128), SMALL)
    args[index] = value
    with pytest.raises(ValueError, match=message):
        gpu_ldlq.ldlq(*args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_high": 9}, "local scales must be 1 to 8, got 11"),
        ({"window_high": -3}, "local scales must be 1 to 8, got -1"),
        ({"keep_pairs": 0}, "keep_pairs must be at least 1"),
        ({"sweeps": -1}, "sweeps at least 0"),
    ],
)
def test_wrong_numbers_are_named(change: dict, message: str) -> None:
    args = arguments(weights(4, 128), hessian(128), SMALL)
    args[4] = {**args[4], **change}
    with pytest.raises(ValueError, match=message):
        gpu_ldlq.ldlq(*args)


def test_a_metric_of_another_size_is_named() -> None:
    args = arguments(weights(4, 128), hessian(128), SMALL)
    args[1] = make_metric(hessian(256), 0.01).as_dict()
    with pytest.raises(ValueError, match=r"h must be \[128, 128\], got \[256, 256\]"):
        gpu_ldlq.ldlq(*args)


def test_encoder_stores_and_measures_what_the_cpu_does() -> None:
    w, h = odd_weights(24, 256, seed=24), hessian(256, "low rank")
    uncalibrated = make_encoder("wint2", "fast", threads=1)
    known = InputHessian(h, 1000)
    cpu, gpu = (
        calibrated_encoder("fast", 1, lambda name: known, uncalibrated, device).encode(w)
        for device in ("cpu", "gpu")
    )
    for suffix, value in cpu.tensors.items():
        np.testing.assert_array_equal(gpu.tensors[suffix], value, err_msg=suffix)
    assert (gpu.stats, gpu.metrics) == (cpu.stats, cpu.metrics)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(CALIBRATED)


def test_quantize_with_calibration_on_the_gpu_writes_the_cpus_files(
    model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("alpha beta gamma delta " * 400)
    options = {"preset": "fast", "quiet": True, "calibration": text, "calibration_tokens": "1k"}
    quantize(model, tmp_path / "cpu", **options)
    quantize(model, tmp_path / "gpu", device="gpu", **options)
    assert contents(tmp_path / "gpu") == contents(tmp_path / "cpu")
    assert gpu_ldlq.held_bytes() > 0


def test_costs_measured_on_the_gpu_are_the_cpus(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("alpha beta gamma delta " * 400)
    options = {"formats": ("wint2",), "calibration_tokens": "1k", "probe_tokens": 256}
    cpu, gpu = (
        sensitivity.sensitivity(model, text, experts=1, device=device, **options)
        for device in ("cpu", "gpu")
    )
    assert gpu.costs == cpu.costs and all(sum(part.values()) for part in cpu.costs[1].values())


def test_a_gpu_that_is_not_there_is_one_line_before_anything_is_read(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(gpu_library.ENVIRONMENT, str(tmp_path / "none.so"))
    gpu_library.load.cache_clear()
    (tmp_path / "text.txt").write_text("alpha beta")
    command = ["--model", str(model), "--calibration", str(tmp_path / "text.txt")]
    command += ["--device", "gpu"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert sensitivity.main(command) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2 and all("GPU library is not there" in line for line in errors)
