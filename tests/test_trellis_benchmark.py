# SPDX-License-Identifier: Apache-2.0
"""The benchmark of ccq-2t's GPU encoders: rows lost or doubled, devices mixed, a wrong model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import trellis_gpu

from paddle_ccq.families.registry import read_config
from paddle_ccq.targets.fastdeploy.layout import build_plan

CONFIGS = Path(__file__).resolve().parents[1] / "examples" / "configs"


def result(name: str, *rows: dict) -> dict:
    return {"device": {"name": name}, "rows": list(rows)}


def row(preset: str, rate: float) -> dict:
    return {"kind": "data-free", "n": 8, "k": 64, "preset": preset, "call": rate}


def test_later_rows_replace_earlier_ones_and_none_is_lost() -> None:
    found = trellis_gpu.merged(
        [result("a", row("fast", 1.0), row("best", 2.0)), result("a", row("best", 3.0))]
    )
    assert [(r["preset"], r["call"]) for r in found["rows"]] == [("fast", 1.0), ("best", 3.0)]


def test_results_of_different_devices_are_refused() -> None:
    with pytest.raises(SystemExit, match="different devices: a, b"):
        trellis_gpu.merged([result("a", row("fast", 1.0)), result("b", row("fast", 1.0))])


def test_the_model_has_that_many_weights() -> None:
    tensors = build_plan(read_config(CONFIGS / "ernie-4.5-300b-a47b")).tensors
    experts = sum(planned.weights for planned in tensors if planned.tensor.is_expert)
    assert experts == trellis_gpu.ERNIE_300B
