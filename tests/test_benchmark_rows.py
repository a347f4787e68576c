# SPDX-License-Identifier: Apache-2.0
"""Rows of a benchmark measured alone stand among the stored ones, if the text is the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("paddle")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import accuracy
import calibrated
import tuning

ORDER = ["bf16", "plain", "new", "last"]


def row(kl: float, nll: float = 2.5, windows: int = 60) -> dict:
    return {"text": {"windows": windows, "predicted_tokens": 61380, "nll": nll, "kl_mean": kl}}


def test_a_new_row_stands_in_its_place_and_bf16_stays_the_stored_one(tmp_path: Path) -> None:
    path = tmp_path / "stored.json"
    stored = {"bf16": row(0.0), "plain": row(0.3), "last": row(0.1)}
    path.write_text(json.dumps(stored))
    found = accuracy.beside_stored({"bf16": row(0.0, 2.50001), "new": row(0.2)}, path, ORDER)
    assert list(found) == ORDER
    assert found["bf16"] == stored["bf16"] and found["new"] == row(0.2)


@pytest.mark.parametrize("other", [row(0.0, nll=2.6), row(0.0, windows=59)])
def test_rows_of_other_text_are_not_mixed(tmp_path: Path, other: dict) -> None:
    path = tmp_path / "stored.json"
    path.write_text(json.dumps({"bf16": row(0.0), "plain": row(0.3)}))
    with pytest.raises(SystemExit, match="another text"):
        accuracy.beside_stored({"bf16": other, "new": row(0.2)}, path, ORDER)


def test_every_written_row_has_its_place_and_its_format() -> None:
    assert set(calibrated.WRITTEN) < set(calibrated.labels())
    assert calibrated.WRITTEN[calibrated.MEMORY] == "ccq-2t"


def test_labels_of_two_formats_differ(tmp_path: Path) -> None:
    work = tuning.Work(tmp_path, tmp_path / "c.jsonl", tmp_path, "256k", "128k", "256k")
    labels = list(tuning.rows(work))
    assert tuning.prefix("wint2") == ""
    assert not {tuning.prefix("ccq-2t") + label for label in labels} & set(labels)
