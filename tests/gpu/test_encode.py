# SPDX-License-Identifier: Apache-2.0
"""The GPU's search: bytes that differ from the CPU's. Needs a GPU and the library for it."""

from __future__ import annotations

import numpy as np
import pytest

from paddle_ccq import _core
from paddle_ccq.encoder import layouts, recipes
from paddle_ccq.encoder.search import pair_books
from paddle_ccq.ops import gpu, gpu_library

if not gpu_library.available():
    pytest.skip("no GPU, or no library for it", allow_module_level=True)

FORMATS = ["wint2", "ccq-2.5", "ccq-2.75"]
KINDS = [
    "gaussian",
    "outliers",
    "uneven groups",
    "zero groups",
    "tiny",
    "huge",
    "constant",
    "steps",
]


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
    elif kind == "constant":
        w[:] = np.float32(0.5)
    elif kind == "steps":
        # Many exact ties between code book entries and between scales.
        w = np.round(w * 100).astype(np.float32) / np.float32(64)
    return w


def both(w: np.ndarray, format: str, recipe: recipes.Recipe) -> tuple[dict, dict]:
    layout = layouts.LAYOUTS[format]
    books = pair_books(format, recipe)
    shared = books, layout.as_dict(), recipe.as_dict()
    bits = list(layout.index_bits)
    cpu = _core.encode(w, shared[0], bits, shared[1], shared[2], 16, "auto")
    found, _ = gpu.encode(w, *shared)
    timed, milliseconds = gpu.encode(w, *shared, timed=True)
    assert milliseconds > 0
    for name, value in found.items():
        np.testing.assert_array_equal(timed[name], value)
    return cpu, found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("preset", ["fast", "default", "best"])
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_equals_cpu_bit_for_bit(format: str, preset: str, kind: str) -> None:
    recipe = recipes.RECIPES[format][preset]
    for n, k in ((37, 128), (5, 3584)):
        cpu, found = both(weights(kind, n, k, seed=k), format, recipe)
        for name, value in cpu.items():
            np.testing.assert_array_equal(
                found[name].view(np.uint8), value.view(np.uint8), err_msg=f"{name} {n}x{k}"
            )


@pytest.mark.parametrize("format", FORMATS)
def test_many_channels_and_long_rows(format: str) -> None:
    recipe = recipes.RECIPES[format]["default"]
    for n, k in ((1500, 256), (3, 28672)):
        cpu, found = both(weights("gaussian", n, k, seed=n), format, recipe)
        for name, value in cpu.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{name} {n}x{k}")


def test_a_matrix_of_many_overlapped_parts() -> None:
    """About five parts of 32 MB, the last one short; then a smaller matrix in the same buffers."""
    recipe = recipes.RECIPES["wint2"]["fast"]
    for n, k in ((18000, 2048), (700, 128), (40, 4096)):
        cpu, found = both(weights("uneven groups", n, k, seed=n), "wint2", recipe)
        for name, value in cpu.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{name} {n}x{k}")


def test_wrong_arguments_are_named() -> None:
    recipe, layout = recipes.RECIPES["wint2"]["fast"].as_dict(), layouts.LAYOUTS["wint2"].as_dict()
    books = pair_books("wint2", recipes.RECIPES["wint2"]["fast"])
    for w in (np.zeros((2, 96), np.float32), np.zeros((2, 128)), np.zeros((128, 2), np.float32).T):
        with pytest.raises(ValueError, match="weight"):
            gpu.encode(w, books, layout, recipe)
