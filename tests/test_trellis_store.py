# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu/trellis.py stores the tuned model that held-out calibration text prefers."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"))

import trellis
import trellis_store

BEST, FOUR, TWICE = (
    "gradient, best",
    "gradient, best, tuned on all, four times",
    "gradient, best, tuned on all, twice",
)
# KL on held-out calibration text and on validation text, which disagree.
KL = {BEST: (0.1, 0.1), FOUR: (0.2, 0.5), TWICE: (0.3, 0.4)}


class Lab:
    """Rows in place of models: what is tuned is named by its passes."""

    device_name = "none"

    def __init__(self) -> None:
        self.codes: dict[str, Any] = {}

    def encoded(self, choice: Any) -> str:
        return BEST

    def with_codes(self, codes: str) -> str:
        return codes

    def tuned(self, codes: str, way: Any, made: bool) -> str:
        return {2: TWICE, 4: FOUR}[way.passes]

    def measured(self, weights: str, text: str) -> dict[str, np.ndarray]:
        kl = KL[weights][text == trellis.VALIDATION]
        return {"kl": np.array([kl, kl]), "nll": np.zeros(2)}

    def proxy(self, choice: Any, weights: str) -> dict[str, float]:
        return {"up": 0.0}


@pytest.mark.parametrize("rows", [[BEST, FOUR, TWICE], [BEST, TWICE, FOUR]])
def test_held_out_text_decides_what_is_stored(
    rows: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = []

    def save(folder: Path, lab: Lab, codes: str, weights: str) -> None:
        stored.append((folder, codes, weights))

    monkeypatch.setattr(trellis_store, "save", save)
    file = tmp_path / "trellis.json"
    args = argparse.Namespace(rows=rows, seconds=1e9, json=file, name="m", store=tmp_path)
    trellis.measure(Lab(), args, 0.0)
    assert stored[-1] == (tmp_path, BEST, FOUR)
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["stored"] == FOUR
    assert list(result["rows"]) == rows


def test_a_row_that_does_not_exist_is_named(tmp_path: Path) -> None:
    args = argparse.Namespace(rows=["gradient, twice"], seconds=0, json=None, name="m", store=None)
    with pytest.raises(SystemExit, match="no such row: gradient, twice"):
        trellis.measure(Lab(), args, 0.0)
