# SPDX-License-Identifier: Apache-2.0
"""Small files of results that are there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def partial_name(path: Path) -> Path:
    """Under what name a file is written until it is whole; every process has its own."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def is_stream(path: Path) -> bool:
    """A pipe or a device: nothing is overwritten there, and it must not be replaced by a file."""
    return path.exists() and not path.is_file() and not path.is_dir()


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let `write` make the file, under another name until it is whole; a pipe is just written.

    Raises:
        OSError: naming the file, if it cannot be written; nothing is left then.
    """
    path = Path(path)
    if is_stream(path):
        write(path)
        return
    partial = partial_name(path)
    try:
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)
