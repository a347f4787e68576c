# SPDX-License-Identifier: Apache-2.0
"""The calibration text as windows of tokens, with the hash that provenance records."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.reader import Checkpoint
from ..errors import CcqError
from .settings import Settings


@dataclass(frozen=True)
class CalibrationText:
    """Windows of tokens of one text."""

    path: Path
    sha256: str
    windows: tuple[np.ndarray, ...]

    @property
    def tokens(self) -> int:
        return sum(window.size for window in self.windows)

    def as_dict(self, settings: Settings) -> dict[str, Any]:
        """Provenance: which text, and how it was used. The path is left out: it names a machine."""
        return {
            "text": self.path.name,
            "text_sha256": self.sha256,
            "tokens_used": self.tokens,
            **settings.as_dict(),
            "window": max(window.size for window in self.windows),
        }


def text_sha256(path: str | os.PathLike[str]) -> str:
    """Hash of the file as it is."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_calibration_text(
    path: str | os.PathLike[str], checkpoint: Checkpoint, settings: Settings
) -> CalibrationText:
    """Tokenize a .jsonl or .txt file with the model's own tokenizer.

    Raises:
        CcqError: if the file is missing, holds no text, or does not fit the model.
    """
    from ..evaluation.text import Tokenizer, cut_windows, read_documents, token_stream

    path = Path(path)
    if not path.is_file():
        raise CcqError(f"--calibration {path}: no such file")
    config = checkpoint.config
    tokenizer = Tokenizer(checkpoint.path, config.raw)
    stream = token_stream(read_documents(path), tokenizer)
    if int(stream.max()) >= config.vocab_size:
        raise CcqError(
            f"{tokenizer.path}: gives token {int(stream.max())}, but config.json has vocab_size"
            f" {config.vocab_size}"
        )
    window = min(settings.window, config.max_position_embeddings, settings.tokens)
    windows = cut_windows(stream, max(window, 2), max(settings.tokens, 2))
    return CalibrationText(path, text_sha256(path), tuple(windows))
