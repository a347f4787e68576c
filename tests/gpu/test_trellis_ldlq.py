# SPDX-License-Identifier: Apache-2.0
"""The GPU's calibrated search of ccq-2t: bytes that differ from the CPU's. Needs a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from helpers.trellis_cases import KINDS, hessian, weights
from paddle_ccq import _core
from paddle_ccq.encoder.ldlq import prepare
from paddle_ccq.encoder.trellis_ldlq import TRELLIS_LDLQ_RECIPES, TrellisLdlqRecipe
from paddle_ccq.encoder.trellis_metric import make_trellis_metric
from paddle_ccq.ops import gpu_library, gpu_trellis_ldlq

if not gpu_library.available():
    pytest.skip("no GPU, or no library for it", allow_module_level=True)


def assert_same(w: np.ndarray, h: np.ndarray, recipe: TrellisLdlqRecipe) -> None:
    prepared = prepare(w, recipe)
    metric = make_trellis_metric(h, recipe.damping).as_dict()
    args = (prepared.weight, metric, prepared.supers, recipe.as_dict())
    expected = _core.trellis_ldlq(*args, 16, "auto")
    found, milliseconds = gpu_trellis_ldlq.trellis_ldlq(*args)
    assert milliseconds > 0
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("preset", TRELLIS_LDLQ_RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_equals_cpu_bit_for_bit(kind: str, preset: str) -> None:
    for n, k, of in ((37, 256, "autoregressive"), (9, 512, "few")):
        assert_same(weights(kind, n, k, seed=k), hessian(k, of), TRELLIS_LDLQ_RECIPES[preset])


def test_more_channels_than_blocks_and_a_wide_beam() -> None:
    assert_same(weights("gaussian", 5000, 128), hessian(128), TRELLIS_LDLQ_RECIPES["fast"])
    recipe = replace(TRELLIS_LDLQ_RECIPES["fast"], beam=100_000)
    assert_same(weights("gaussian", 20, 128), hessian(128), recipe)
