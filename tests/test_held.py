# SPDX-License-Identifier: Apache-2.0
"""Output bytes, exported GPU functions or choices of kernels that change where nobody meant it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from helpers import held_bytes, held_kernels

WEIGHTS = json.loads(held_bytes.WEIGHTS.read_text())
OTHERS = json.loads(held_bytes.OTHERS.read_text())
KERNELS = json.loads(held_kernels.STORED.read_text())
# What a calibrated run is held against where this processor's float products are others.
UNCALIBRATED = {"example": "wint2-fast", "cut": "tensor-parallel"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> held_bytes.Runs:
    return held_bytes.Runs(tmp_path_factory.mktemp("held"))


def test_every_case_is_stored():
    assert set(WEIGHTS) == set(held_bytes.CASES)
    assert set(OTHERS) == {*held_bytes.CASES, *held_bytes.DRY_RUNS}


@pytest.mark.parametrize("name", held_bytes.CASES)
def test_weights_are_what_they_were(runs, name):
    stored, case = WEIGHTS[name], held_bytes.CASES[name]
    if case.calibrated:
        pytest.importorskip("paddle")
        if runs.statistics(case) != stored["statistics"]:
            # Paddle's products differ between processors, and codes with them.
            free = held_bytes.unquantized_tensors(runs.output(UNCALIBRATED[case.source]))
            tensors = held_bytes.unquantized_tensors(runs.output(name))
            assert tensors.keys() == free.keys()
            assert all(tensors[n].tobytes() == free[n].tobytes() for n in free)
            assert runs.output(name).is_dir()
            return
    assert held_bytes.weights_of(runs, name) == stored


@pytest.mark.parametrize("name", held_bytes.CASES)
def test_other_files_are_what_they_were(runs, name):
    stored, case = OTHERS[name], held_bytes.CASES[name]
    if case.calibrated:
        pytest.importorskip("paddle")
        if runs.statistics(case) != WEIGHTS[name]["statistics"]:
            pytest.skip("errors in the model card depend on this processor's float products")
    assert held_bytes.others_of(runs, name) == stored, (
        "meant? then store it: python tests/helpers/held_bytes.py --write"
    )


@pytest.mark.parametrize("name", held_bytes.DRY_RUNS)
def test_a_dry_run_prints_what_it_did(name):
    text = held_bytes.dry_run_text(held_bytes.DRY_RUNS[name])
    assert hashlib.sha256(text.encode()).hexdigest() == OTHERS[name]


def test_a_changed_weight_changes_a_hash(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = held_bytes.hashes(tmp_path, held_bytes.is_weights)
    (tmp_path / "model.safetensors").write_bytes(b"weightS")
    assert before.keys() == {"model.safetensors"}
    assert held_bytes.hashes(tmp_path, held_bytes.is_weights) != before


def test_exported_functions_are_what_they_were():
    assert held_kernels.exported() == KERNELS["exported"]


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_choices_of_kernels_are_what_they_were(tmp_path: Path):
    assert list(held_kernels.TOKENS) == KERNELS["tokens"]
    assert dict(held_kernels.choices(held_kernels.build(tmp_path))) == KERNELS["choices"]
