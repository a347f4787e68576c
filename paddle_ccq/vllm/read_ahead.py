# SPDX-License-Identifier: Apache-2.0
"""Weight files are read into the page cache ahead of the loader, which meets them one by one.

vLLM maps files into memory, where a single thread waits for each page of a local disk. Threads that
read a few GiB ahead keep the disk busy; what they read stays in the page cache alone.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

THREADS = 8
PIECE = 16 << 20
# Bytes that may be read ahead of the tensor that is being placed.
WINDOW = 8 << 30


class ReadAhead:
    """Threads that read files in their order, at most `window` bytes ahead of what was taken.

    Each piece needs a permit. Permits come back one by one, not a wake-up of all threads for each
    of a checkpoint's many small tensors, which held up the loader itself.
    """

    def __init__(self, files: list[Path], window: int = WINDOW, threads: int = THREADS) -> None:
        self._taken = 0
        self._stopped = False
        self._permits = threading.Semaphore(max(1, window // PIECE))
        self._next = threading.Lock()
        self._pieces = self._all_pieces(files)
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _all_pieces(files: list[Path]) -> Iterator[tuple[Path, int]]:
        """(file, offset in it)."""
        for file in files:
            for offset in range(0, file.stat().st_size, PIECE):
                yield file, offset

    def _run(self) -> None:
        # Whoever loads a file says what is wrong with it.
        with contextlib.suppress(OSError):
            self._read_pieces()

    def _read_pieces(self) -> None:
        buffer = bytearray(PIECE)
        while True:
            self._permits.acquire()
            if self._stopped:
                return
            with self._next:
                piece = next(self._pieces, None)
            if piece is None:
                self._permits.release()  # for a thread that waits for one
                return
            path, offset = piece
            with open(path, "rb", buffering=0) as file:
                file.seek(offset)
                file.readinto(buffer)

    def take(self, size: int) -> None:
        """So many bytes more have been placed."""
        before = self._taken // PIECE
        self._taken += size
        if self._taken // PIECE > before:
            self._permits.release(self._taken // PIECE - before)

    def stop(self) -> None:
        """Read no more, and wait for the threads."""
        self._stopped = True
        self._permits.release(len(self._threads))
        for thread in self._threads:
            thread.join()


def _in_order(folder: Path) -> list[Path]:
    """Weight files as vLLM goes through them."""
    return sorted(folder.glob("*.safetensors"))


def ahead(
    folder: str, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors, with the files of a local folder read ahead while they are taken."""
    files = _in_order(Path(folder)) if folder and os.path.isdir(folder) else []
    if not files:
        yield from weights
        return
    reader = ReadAhead(files)
    try:
        for name, tensor in weights:
            yield name, tensor
            reader.take(tensor.numel() * tensor.element_size())
    finally:
        reader.stop()
