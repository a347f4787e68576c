# SPDX-License-Identifier: Apache-2.0
"""--device gpu without a GPU: what is sent where, what is freed, and what is said when it fails.

Driver and library are stand-ins (helpers/gpu_standin.py). For a GPU: tests/gpu/test_gpu_experts.py.
"""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi")

from helpers.gpu_standin import Driver, Library
from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq import serve
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.errors import CcqError
from paddle_ccq.ops import gpu_library, gpu_memory
from paddle_ccq.ops.gpu_memory import Device
from paddle_ccq.quantize import quantize
from paddle_ccq.serving.engine_model import EngineModel, Piece

TOKENS = [1, *range(3, 40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("gpu")
    write_checkpoint(scratch / "float", tiny_config())
    for layout in ("2.0", "2.1"):
        quantize(
            scratch / "float", scratch / layout, preset="fast", quiet=True, fastdeploy_layout=layout
        )
    other = scratch / "ccq-2.5"
    quantize(scratch / "float", other, format="ccq-2.5", preset="fast", quiet=True)
    trellis = scratch / "ccq-2t"
    quantize(scratch / "float", trellis, format="ccq-2t", preset="fast", quiet=True)
    return scratch


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    library = driver.library = Library(driver)
    monkeypatch.setattr(gpu_library, "load_products", lambda: library)
    monkeypatch.setattr(gpu_memory, "_driver", lambda: driver)
    return driver


def logits(model: EngineModel, cuts: tuple[int, ...] = ()) -> np.ndarray:
    cache = model.new_cache(64)
    region = cache.allocate(len(TOKENS))
    found = []
    for first, last in zip((0, *cuts), (*cuts, len(TOKENS)), strict=True):
        found.append(model.forward([Piece(TOKENS[first:last], first, region)], cache)[0])
    return found[-1]


@pytest.mark.parametrize("layout", ["2.0", "2.1"])
def test_experts_on_the_gpu_are_the_cpus(folder: Path, driver: Driver, layout: str) -> None:
    checkpoint = open_checkpoint(folder / layout)
    here, there = EngineModel(checkpoint), EngineModel(checkpoint, device=Device())
    assert there.expert_bytes == 0 and there.dense_bytes == here.dense_bytes
    # 2.06 bits a weight and 16 bytes a column.
    assert there.gpu_bytes == 2 * 4 * (3 * 128 * 128 * 33 // 128 + 3 * 128 * 16)
    wanted = logits(here)
    found = []
    thread = threading.Thread(target=lambda: found.append(logits(there, (1, 30))))
    driver.current = None  # as it is in a thread that has not called the driver yet
    thread.start()
    thread.join()
    assert driver.library.calls == 2 * 3
    assert np.linalg.norm(found[0] - wanted) < 0.02 * np.linalg.norm(wanted)


def test_experts_with_memory_on_the_gpu_are_the_cpus(folder: Path, driver: Driver) -> None:
    checkpoint = open_checkpoint(folder / "ccq-2t")
    here, there = EngineModel(checkpoint), EngineModel(checkpoint, device=Device())
    # 64 columns x 128 rows are 2176 bytes, and a column's super scale is 4.
    assert there.gpu_bytes == 2 * 4 * 3 * (2 * 2176 + 128 * 4)
    wanted, found = logits(here), logits(there, (1, 30))
    assert driver.library.calls == 2 * 3
    assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)


def test_device_memory_is_only_what_is_needed_and_freed(folder: Path, driver: Driver) -> None:
    model = EngineModel(open_checkpoint(folder / "2.1"), device=Device())
    held = sum(len(block) for block in driver.blocks.values())
    assert held == model.gpu_bytes  # nothing is left from repacking
    logits(model)
    logits(model)
    grown = sum(len(block) for block in driver.blocks.values()) - held
    assert 0 < grown < 1 << 20
    del model
    gc.collect()
    assert not driver.blocks


def test_a_full_gpu_is_one_line(folder: Path, driver: Driver) -> None:
    driver.capacity = 100_000
    with pytest.raises(CcqError, match=r"--device gpu: cuMemAlloc_v2: out of memory"):
        EngineModel(open_checkpoint(folder / "2.1"), device=Device())
    gc.collect()
    assert not driver.blocks


def test_a_failing_kernel_is_named(folder: Path, driver: Driver) -> None:
    model = EngineModel(open_checkpoint(folder / "2.1"), device=Device())
    driver.library.ccq_moe = lambda *_: 1
    with pytest.raises(CcqError, match="the experts on the GPU failed: invalid argument"):
        logits(model)


def test_a_checkpoint_for_which_the_gpu_is_no_help(
    folder: Path, driver: Driver, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder / "ccq-2.5"), "--device", "gpu", "--port", "0"]
    assert serve.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --device gpu: ") and "--device cpu" in error


def test_without_library_or_gpu_it_is_said_before_loading(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [str(folder / "2.1"), "--device", "gpu"]
    monkeypatch.setenv(gpu_library.ENVIRONMENT, str(tmp_path / "none.so"))
    gpu_library.load.cache_clear()
    try:
        assert serve.main(arguments) == 2
    finally:
        gpu_library.load.cache_clear()
    assert "python -m paddle_ccq.ops.gpu_library" in capsys.readouterr().err
    monkeypatch.setattr(gpu_library, "load_products", lambda: None)
    monkeypatch.setattr(gpu_memory, "_NAMES", ("libcuda-that-is-not-there.so",))
    gpu_memory._driver.cache_clear()
    try:
        assert serve.main(arguments) == 2
    finally:
        gpu_memory._driver.cache_clear()
    error = capsys.readouterr().err
    assert error.startswith("error: --device gpu: no CUDA driver") and error.count("\n") == 1
