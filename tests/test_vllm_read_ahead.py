# SPDX-License-Identifier: Apache-2.0
"""Reading weight files ahead of the loader: what is read, how far, and that it ends."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from paddle_ccq.vllm import read_ahead


class Tensor:
    def __init__(self, size: int) -> None:
        self.size = size

    def numel(self) -> int:
        return self.size

    def element_size(self) -> int:
        return 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        data = np.random.default_rng(i).bytes(100_000 + i)
        (tmp_path / f"model-{i}.safetensors").write_bytes(data)
    return tmp_path


def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The pieces that threads take from now on."""
    found: list[tuple[str, int]] = []
    pieces = read_ahead.ReadAhead._all_pieces

    def watched(files: list[Path]):
        for path, offset in pieces(files):
            found.append((path.name, offset))
            yield path, offset

    monkeypatch.setattr(read_ahead, "PIECE", 10_000)
    monkeypatch.setattr(read_ahead.ReadAhead, "_all_pieces", staticmethod(watched))
    return found


def test_all_tensors_come_and_all_files_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = seen(monkeypatch)
    monkeypatch.setattr(read_ahead, "WINDOW", 1 << 30)
    weights = [(f"t{i}", Tensor(1000)) for i in range(300)]

    def slowly():
        for i, pair in enumerate(weights):
            if i == len(weights) - 1:  # the threads have all the time that they need
                for thread in threading.enumerate():
                    if thread.daemon and thread.name.startswith("Thread"):
                        thread.join(10)
            yield pair

    assert list(read_ahead.ahead(str(folder), slowly())) == weights
    wanted = [
        (f"model-{i}.safetensors", o) for i in range(3) for o in range(0, 100_000 + i, 10_000)
    ]
    assert sorted(pieces) == sorted(wanted)


def test_nothing_is_read_beyond_the_window(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = seen(monkeypatch)
    files = sorted(folder.glob("*.safetensors"))
    reader = read_ahead.ReadAhead(files, window=30_000, threads=1)
    reader.take(20_000)
    reader._threads[0].join(0.5)
    assert [offset for _, offset in pieces] == [0, 10_000, 20_000, 30_000, 40_000]
    reader.stop()
    assert not any(thread.is_alive() for thread in reader._threads)


def test_small_tensors_wake_a_thread_for_each_piece_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of this package has thousands of tensors of a few KiB."""
    pieces = seen(monkeypatch)
    reader = read_ahead.ReadAhead(sorted(folder.glob("*")), window=10_000, threads=4)
    released: list[int] = []
    release = reader._permits.release

    def watched(count: int = 1) -> None:
        released.append(count)
        release(count)

    monkeypatch.setattr(reader._permits, "release", watched)
    for _ in range(3000):
        reader.take(10)
    assert released == [1, 1, 1]
    for thread in reader._threads:
        thread.join(0.2)
    assert [offset for _, offset in pieces] == [0, 10_000, 20_000, 30_000]
    reader.stop()
    assert not any(thread.is_alive() for thread in reader._threads)


def test_threads_end_with_a_loader_that_gives_up(folder: Path) -> None:
    before = threading.active_count()
    taking = read_ahead.ahead(str(folder), iter([("a", Tensor(1)), ("b", Tensor(1))]))
    next(taking)
    taking.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("place", ["", "owner/name", "/does/not/exist"])
def test_what_is_no_folder_is_left_alone(place: str) -> None:
    weights = [("a", Tensor(1))]
    assert list(read_ahead.ahead(place, iter(weights))) == weights


@pytest.mark.parametrize("before", [True, False])
def test_a_file_that_goes_away_is_the_loaders_to_report(
    before: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    files = [folder / "model-0.safetensors", folder / "model-1.safetensors"]
    if before:
        files[1].unlink()
    reader = read_ahead.ReadAhead(files, threads=1)
    for path in files:
        path.unlink(missing_ok=True)
    reader.stop()
    assert not any(thread.is_alive() for thread in reader._threads)
    assert not raised
