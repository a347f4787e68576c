# SPDX-License-Identifier: Apache-2.0
"""The GPU's search of ccq-2t: bytes that differ from the CPU's. Needs a GPU and the library."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.trellis_cases import KINDS, NARROW, WIDE, weights
from paddle_ccq import _core
from paddle_ccq.encoder.recipes import TRELLIS_RECIPES, TrellisRecipe
from paddle_ccq.ops import gpu_library, gpu_trellis

if not gpu_library.available():
    pytest.skip("no GPU, or no library for it", allow_module_level=True)

RECIPES = {"narrow": NARROW, "wide": WIDE, **TRELLIS_RECIPES}


def assert_same(w: np.ndarray, recipe: TrellisRecipe, **options: int) -> None:
    expected = _core.trellis(w, recipe.as_dict(), 16, "auto")
    found, milliseconds = gpu_trellis.trellis(w, recipe.as_dict(), **options)
    assert milliseconds > 0
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_equals_cpu_bit_for_bit(kind: str, recipe: str) -> None:
    for n, k in ((37, 128), (5, 3584)):
        assert_same(weights(kind, n, k, seed=k), RECIPES[recipe])


def test_more_channels_than_fit_at_once_and_little_memory() -> None:
    w = weights("gaussian", 2500, 128, seed=1)
    assert_same(w, TRELLIS_RECIPES["fast"])
    assert_same(w, TRELLIS_RECIPES["fast"], run_bytes=20 << 20)


def test_the_same_bytes_twice() -> None:
    w = weights("awkward", 200, 512, seed=2)
    one, two = (gpu_trellis.trellis(w, TRELLIS_RECIPES["best"].as_dict())[0] for _ in range(2))
    for name, value in one.items():
        assert two[name].tobytes() == value.tobytes(), name
