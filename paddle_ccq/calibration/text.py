# SPDX-License-Identifier: Apache-2.0
"""The calibration text as windows of tokens, with the hash that provenance records."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checkpoint.reader import Checkpoint
from ..errors import CcqError
from ..texts.documents import Texts, read_texts
from .settings import CalibrationSettings


@dataclass(frozen=True)
class CalibrationText:
    """Windows of tokens of one text."""

    label: str
    sha256: str
    windows: tuple[np.ndarray, ...]

    @property
    def tokens(self) -> int:
        """Tokens that are used, which may be fewer than the text has."""
        return sum(window.size for window in self.windows)

    def as_dict(self, settings: CalibrationSettings) -> dict[str, Any]:
        """Provenance: which text, and how it was used. The path is left out: it names a machine."""
        return {
            "text": self.label,
            "text_sha256": self.sha256,
            "tokens_used": self.tokens,
            **settings.as_dict(),
            "window": max(window.size for window in self.windows),
        }


def read_calibration_text(
    text: Texts | str | os.PathLike[str], checkpoint: Checkpoint, settings: CalibrationSettings
) -> CalibrationText:
    """Tokenize a text, or a file that is read now, with the model's own tokenizer.

    Raises:
        CcqError: if the file is missing, holds no text, or does not fit the model.
    """
    from ..evaluation.text import Tokenizer, cut_windows, token_stream

    texts = text if isinstance(text, Texts) else read_texts(text, "--calibration")
    config = checkpoint.config
    tokenizer = Tokenizer(checkpoint.path, config.raw)
    stream = token_stream(texts.documents, tokenizer)
    if int(stream.max()) >= config.vocab_size:
        raise CcqError(
            f"{tokenizer.path}: gives token {int(stream.max())}, but config.json has vocab_size"
            f" {config.vocab_size}"
        )
    window = min(settings.window, config.max_position_embeddings, settings.tokens)
    windows = cut_windows(stream, max(window, 2), max(settings.tokens, 2))
    return CalibrationText(texts.label, texts.sha256, tuple(windows))
