# SPDX-License-Identifier: Apache-2.0
"""Quantized tiny models of other families, each made once for a test file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.family_models import (
    Case,
    Tensors,
    random_tensors,
    write_source,
)
from paddle_ccq.checkpoint.safetensors_io import TensorFolder
from paddle_ccq.quantize import quantize

OPTIONS = {"preset": "fast", "quiet": True}


@dataclass(frozen=True)
class Made:
    """A case, its source folder, and the quantized folder."""

    case: Case
    source: Path
    output: Path


def maker(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Made]:
    """Quantizes a case, once for each."""
    known: dict[str, Made] = {}

    def make(case: Case) -> Made:
        if case.name not in known:
            folder = tmp_path_factory.mktemp(case.name)
            write_source(folder / "source", case.config, random_tensors(case))
            quantize(folder / "source", folder / "output", **OPTIONS)
            known[case.name] = Made(case, folder / "source", folder / "output")
        return known[case.name]

    return make


def stored(folder: Path) -> Tensors:
    """All tensors of a folder; the safetensors library has no FP8 in NumPy."""
    tensors = TensorFolder(folder)
    return {name: tensors.read(name) for name in tensors.names()}


def entry_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def changed_source(plain: Made, folder: Path, **changes: np.ndarray | None) -> Path:
    """The source with tensors added, replaced or (None) taken away."""
    tensors = stored(plain.source)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    write_source(folder, json.loads((plain.source / "config.json").read_text()), tensors)
    return folder
