# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark's arithmetic: ratios, roofs and tables that would mislead a reader."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"))

import measure
import report

SHAPE = measure.Shape("ERNIE-300B up_gate", 64, 7168, 8192)


def rows() -> list[dict]:
    """Ours with two variants, Marlin, and a case without a peer."""
    made = [
        ("ccq", 1, 8, 60e-6, 4), ("ccq", 1, 8, 50e-6, 7), ("marlin-w4", 1, 8, 100e-6, -1),
        ("ccq", 16, 55, 300e-6, -1),
    ]  # fmt: skip
    return [
        measure.figures(who, tokens, 8 * tokens, SHAPE, hit, seconds, 4.5e12)
        | {"pairs": "integer", "variant": variant}
        for who, tokens, hit, seconds, variant in made
    ]


def test_the_roof_is_the_bytes_of_the_experts_hit_over_the_bandwidth() -> None:
    ours, _, marlin, _ = rows()
    weights, activations = 8 * 7168 * 8192 * 2.0625 / 8, 8 * (7168 + 8192) * 2
    assert ours["roof_us"] == pytest.approx((weights + activations) / 4.5e12 * 1e6)
    assert ours["percent"] == pytest.approx(100 * ours["roof_us"] / 60)
    # A peer's bandwidth counts its own bytes, its share of the roof ours.
    assert marlin["GBps"] == pytest.approx((2 * weights + activations) / 100e-6 / 1e9)
    assert marlin["percent"] == pytest.approx(ours["roof_us"])
    assert ours["TFLOPs"] == pytest.approx(2 * 8 * 7168 * 8192 / 60e-6 / 1e12)


def test_the_table_takes_the_fastest_variant_and_says_how_many_times_longer_a_peer_takes() -> None:
    result = {"gemm": rows(), "rates": {"dense": 800.0}}
    header, cells = report.table(result)
    assert header[-1] == "Marlin W4A16 (vLLM) µs (x)" and len(header) == len(cells[0])
    assert cells[0][3] == "50.0" and cells[0][-1] == "100.0 (2.00)"
    assert cells[1][1] == "16" and cells[1][-1] == ""
    assert len(report.text(result).splitlines()) == 3
    assert report.markdown(result).count("\n") == 3


def test_the_blocks_verdict_follows_its_limit() -> None:
    row = {
        "shape": "b", "tokens": 1, "us": 80.0, "up_us": 40.0, "down_us": 25.0, "rest_us": 15.0,
        "roofs_us": 60.0, "limit_us": 88.0,
    }  # fmt: skip
    assert "within the limit of 88.0" in report.block_line(row)
    assert "above the limit" in report.block_line(row | {"us": 90.0})
