# SPDX-License-Identifier: Apache-2.0
"""The calibrated search's benchmark: work miscounted, matrices forgotten, a false projection."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import ldlq_gpu
import ldlq_work

from paddle_ccq.encoder.ldlq import LDLQ_RECIPES
from paddle_ccq.families.registry import read_config
from paddle_ccq.targets.fastdeploy.layout import build_plan

CONFIGS = Path(__file__).resolve().parents[1] / "examples" / "configs"
FOLDERS = ("ernie-4.5-21b-a3b", "ernie-4.5-300b-a47b")
RATE = 132 * 128 * 1.98e9


def counted(k: int, recipe) -> dict[str, tuple[float, float]]:
    """Terms and entries of each part for one channel, by walking through it as the CPU does."""
    groups = range(0, k, 64)

    def run(tries: int) -> tuple[int, int]:
        return sum(64 * (k - g - 64) for g in groups), len(groups) * 16 * 256 * tries

    screened = [run(1) for _ in range(recipe.code_pairs)]
    tries = recipe.window[1] - recipe.window[0] + 1
    tried = [run(tries) for _ in range(recipe.keep_pairs * len(recipe.kappas))]
    # H w and H e; then per sweep 64 moves a group onto k rows, and H e again.
    terms, entries = 2 * k * k, 0
    for _ in range(recipe.sweeps):
        terms += sum(64 * k for _ in groups) + k * k
        entries += len(groups) * 16 * 256 * 3

    def total(runs):
        return sum(r[0] for r in runs), sum(r[1] for r in runs)

    return {"pairs": total(screened), "feedback": total(tried), "descent": (terms, entries)}


@pytest.mark.parametrize("preset", ["fast", "default", "best"])
@pytest.mark.parametrize("k", [64, 320, 3584])
def test_work_is_what_a_walk_through_the_search_counts(k: int, preset: str) -> None:
    recipe = LDLQ_RECIPES[preset]
    work, expected = ldlq_work.work(k, recipe), counted(k, recipe)
    for part, (terms, entries) in expected.items():
        assert work[part][:2] == pytest.approx((terms / k, entries / k)), part


def test_a_part_that_is_left_out_counts_nothing() -> None:
    work = ldlq_work.work(256, replace(LDLQ_RECIPES["fast"], keep_pairs=4, sweeps=0))
    assert work["pairs"] == work["descent"] == (0.0, 0.0, 0)
    assert work["feedback"][0] == 4 * 96


def test_all_wint2_experts_of_both_models_are_counted() -> None:
    found = Counter()
    for model, folder in zip(ldlq_work.MODELS, FOLDERS, strict=True):
        config = read_config(CONFIGS / folder)
        for planned in build_plan(config).tensors:
            if planned.format == "wint2" and planned.tensor.is_expert:
                k, n = planned.shape
                found[model, planned.name.split(".")[-2], n, k] += 1
    assert {(s.model, s.name, s.n, s.k): s.count for s in ldlq_work.SHAPES} == found


def result(wall_ms: float, factors: float) -> dict:
    """As the benchmark leaves it, for one matrix of the 300B and one of the 21B."""
    matrices = []
    for shape in ldlq_work.SHAPES[1::2]:
        guess = ldlq_work.predicted(shape, LDLQ_RECIPES["default"], RATE)
        run = {
            "wall_ms": wall_ms, "parts_ms": dict.fromkeys(guess, 2.0), "predicted_ms": guess,
            "terms_a_weight": 1000.0, "terms_a_second": 9e12, "share_of_peak": 0.5,
            "same_as_cpu": True,
        }  # fmt: skip
        row = {**vars(shape), "host_seconds": {"factors": factors, "rest": 1.0}}
        matrices.append({**row, "presets": {"default": run}})
    return {
        "device": {"name": "H", "processors": 132, "clock": 1.98e9}, "processor": "P",
        "threads": 4, "checked": 48, "matrices": matrices, "held_bytes": 5e9,
    }  # fmt: skip


def test_projection_multiplies_calls_and_keeps_the_host_apart() -> None:
    small, large = ldlq_gpu.projection(result(1200.0, 9.0))
    assert small[:2] == ["ERNIE-4.5-21B, default", "1,728"]
    assert large[:2] == ["ERNIE-4.5-300B, default", "3,008"]
    assert large[3:] == ["1.0 h", "7.5 h", "50.1 min"]
    assert small[3:] == ["34.6 min", "4.3 h", "28.8 min"]


def test_table_tells_when_bytes_differ() -> None:
    good = result(1200.0, 9.0)
    assert "the same bytes" in ldlq_gpu.table(good)
    good["matrices"][0]["presets"]["default"]["same_as_cpu"] = False
    assert "DIFFERENT" in ldlq_gpu.table(good)
