# SPDX-License-Identifier: Apache-2.0
"""Fixtures of several test files."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.family_models import Case
from helpers.family_runs import Made, maker
from helpers.synthetic import write_checkpoint


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a model with `write_checkpoint`'s arguments; returns its folder.

    The same arguments give the same folder again, in all files: a test that changes a model writes
    its own.
    """
    made: dict[str, Path] = {}

    def model(config: dict[str, Any], **options: Any) -> Path:
        key = json.dumps([config, options], sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("source") / "tiny"
            write_checkpoint(made[key], config, **options)
        return made[key]

    return model


@pytest.fixture(scope="session")
def calibrated_options(calibration_text: Path) -> dict[str, Any]:
    """Of a quick quantization with statistics."""
    return {
        "preset": "fast",
        "quiet": True,
        "calibration": calibration_text,
        "calibration_tokens": "1k",
    }


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight documents of four words."""
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta"]
    lines = [{"text": " ".join(rng.choices(words, k=100))} for _ in range(8)]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def emulated_gpu_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GPU library's searches, compiled once for the processor."""
    from helpers import emulated_gpu

    return emulated_gpu.build(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def emulated_gpu_library(
    emulated_gpu_build: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A copy for each test file: the device's memory is the loaded library's."""
    return Path(shutil.copy(emulated_gpu_build, tmp_path_factory.mktemp("gpu")))


@pytest.fixture
def emulated_gpu(emulated_gpu_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """That library in the GPU's place."""
    from paddle_ccq.ops import gpu_library

    monkeypatch.setenv(gpu_library.ENVIRONMENT, str(emulated_gpu_library))
    gpu_library.load.cache_clear()
    yield
    gpu_library.load.cache_clear()


@pytest.fixture(scope="session")
def experts() -> dict[str, np.ndarray]:
    """Stored tensors of the FastDeploy plugin's expert block."""
    from helpers import fastdeploy_case

    return fastdeploy_case.expert_tensors()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Made]:
    """Quantizes a case of another family, once for each; a test that changes a folder copies it."""
    return maker(tmp_path_factory)
