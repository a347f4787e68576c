# SPDX-License-Identifier: Apache-2.0
"""The GPU's calibrated search: bytes that differ from the CPU's. Needs a GPU and its library."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from helpers import ldlq_cases
from helpers.ldlq_cases import arguments, hessian, odd_weights
from paddle_ccq import _core
from paddle_ccq.encoder import ldlq
from paddle_ccq.encoder.ldlq_metric import make_metric
from paddle_ccq.ops import gpu_ldlq, gpu_library

if not gpu_library.available():
    pytest.skip("no GPU, or no library for it", allow_module_level=True)

SMALL = ldlq.LdlqRecipe(code_pairs=5, keep_pairs=2, window=(-1, 1), sweeps=2)
KINDS = [*ldlq_cases.KINDS, "identity"]
THREADS = 16


def on_cpu(args: list, at: np.ndarray | slice = slice(None)) -> dict[str, np.ndarray]:
    weight, supers = args[0][at], np.ascontiguousarray(args[3][:, at])
    return _core.ldlq(weight, *args[1:3], supers, args[4], THREADS, "auto")


def assert_same(args: list, run_bytes: int = gpu_ldlq.RUN_BYTES) -> None:
    found, times = gpu_ldlq.ldlq(*args, run_bytes=run_bytes)
    assert all(t >= 0 for t in times.values())
    for name, value in on_cpu(args).items():
        np.testing.assert_array_equal(found[name].view(np.uint8), value.view(np.uint8), name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", ["fast", "default", "best"])
def test_gpu_equals_cpu_bit_for_bit(kind: str, preset: str) -> None:
    recipe = ldlq.LDLQ_RECIPES[preset]
    for n, k in ((37, 320), (130, 128)):
        assert_same(arguments(odd_weights(n, k, seed=k), hessian(k, kind), recipe))


def test_random_shapes_and_recipes() -> None:
    rng = np.random.default_rng(7)
    for case in range(25):
        n, k = int(rng.integers(1, 700)), 64 * int(rng.integers(1, 15))
        pairs = int(rng.integers(1, 9))
        low, tries = int(rng.integers(-4, 2)), int(rng.integers(1, 9))
        recipe = ldlq.LdlqRecipe(
            kappas=tuple(rng.uniform(6, 12, int(rng.integers(1, 4))).tolist()),
            window=(low, low + tries - 1),
            code_pairs=pairs,
            keep_pairs=int(rng.integers(1, pairs + 2)),
            sweeps=int(rng.integers(0, 4)),
            damping=float(10 ** rng.uniform(-9, -1)),
        )
        kind = KINDS[case % len(KINDS)]
        assert_same(arguments(odd_weights(n, k, seed=case), hessian(k, kind, case), recipe))


@pytest.mark.parametrize("shape", [(1500, 1024), (60, 4096), (9000, 256)])
def test_many_channels_and_long_rows(shape: tuple[int, int]) -> None:
    n, k = shape
    recipe = ldlq.LDLQ_RECIPES["default"]
    assert_same(arguments(odd_weights(n, k, seed=n), hessian(k, "low rank"), recipe))


def test_a_whole_expert_matrix_at_its_ends_and_in_the_middle() -> None:
    args = arguments(
        odd_weights(3072, 2560, seed=0), hessian(2560, "low rank"), ldlq.LDLQ_RECIPES["default"]
    )
    found, _ = gpu_ldlq.ldlq(*args)
    at = np.r_[0:24, 1500:1524, 3048:3072]
    for name, value in on_cpu(args, at).items():
        np.testing.assert_array_equal(found[name][at], value, name)


def test_of_equal_entries_the_first_is_taken() -> None:
    args = arguments(odd_weights(70, 256, seed=0), np.eye(256), SMALL)
    # Eight vectors for 256 bytes: equal ones in every thread, next to each other and far apart.
    args[2] = np.ascontiguousarray(args[2][:, :, (np.arange(256) >> 4 & 7) * 31])
    assert_same(args)


def test_two_calls_give_the_same_whatever_came_between() -> None:
    first = arguments(
        odd_weights(600, 512, seed=0), hessian(512, "low rank"), ldlq.LDLQ_RECIPES["fast"]
    )
    other = arguments(odd_weights(600, 512, seed=1), hessian(512, "correlated"), SMALL)
    a, _ = gpu_ldlq.ldlq(*first)
    assert_same(other)
    held = gpu_ldlq.held_bytes()
    b, _ = gpu_ldlq.ldlq(*first)
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name
    assert gpu_ldlq.held_bytes() == held


@pytest.mark.parametrize("megabytes", [1, 3, 20])
def test_memory_for_fewer_channels_at_a_time(megabytes: int) -> None:
    args = arguments(odd_weights(700, 256, seed=0), hessian(256, "low rank"), SMALL)
    assert_same(args, megabytes << 20)


def test_wrong_arguments_are_named() -> None:
    args = arguments(odd_weights(8, 128, seed=0), hessian(128, "correlated"), SMALL)
    with pytest.raises(ValueError, match="run_bytes 1000: too little"):
        gpu_ldlq.ldlq(*args, run_bytes=1000)
    for index, value, name in (
        (0, args[0][:, :96], "weight"),
        (0, args[0].astype(np.float64), "weight"),
        (1, make_metric(np.eye(256), 0.01).as_dict(), "h must be"),
        (2, args[2][:, :, :255], "books"),
        (3, args[3][:, :7], "supers"),
        (4, {**args[4], "window_high": 20}, "local scales"),
        (4, replace(SMALL, keep_pairs=0).as_dict(), "keep_pairs"),
    ):
        bad = [*args]
        bad[index] = value
        with pytest.raises(ValueError, match=name):
            gpu_ldlq.ldlq(*bad)
    assert_same(args)
