# SPDX-License-Identifier: Apache-2.0
"""What a run of `quantize` wrote, and runs that stop half-way."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from paddle_ccq.checkpoint import writer


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by relative name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def partial(out: Path) -> Path:
    """The folder that holds an unfinished output."""
    return out.with_name(out.name + ".ccq-partial")


def stop_after(monkeypatch: pytest.MonkeyPatch, items: int) -> None:
    """Make the next runs in this process fail after some matrices."""
    original = writer.CheckpointWriter.write

    def limited(self, planned, parts, stats):
        if planned.index >= items:
            raise KeyboardInterrupt
        return original(self, planned, parts, stats)

    monkeypatch.setattr(writer.CheckpointWriter, "write", limited)
