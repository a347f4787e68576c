# SPDX-License-Identifier: Apache-2.0
"""The text and the tasks that the accuracy benchmarks score models on."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from paddle_ccq.checkpoint.reader import Checkpoint
from paddle_ccq.evaluation.metrics import TextScores
from paddle_ccq.evaluation.run import score_tasks, score_text, summarize
from paddle_ccq.evaluation.tasks import read_items
from paddle_ccq.evaluation.text import Tokenizer, cut_windows, token_stream
from paddle_ccq.models.ernie import Ernie
from paddle_ccq.texts.documents import read_documents

REFERENCE = "bf16"


def add_arguments(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """--text, --tasks, --window and --max-tokens."""
    parser.add_argument("--text", required=True)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=max_tokens)


class Scoring:
    """Windows and items, cut by the float model's tokenizer; all models see the same."""

    def __init__(self, source: Checkpoint, args: argparse.Namespace) -> None:
        self.tokenizer = Tokenizer(source.path, source.config.raw)
        stream = token_stream(read_documents(args.text), self.tokenizer)
        self.windows = cut_windows(stream, args.window, args.max_tokens)
        self.items = [item for path in args.tasks for item in read_items(path)]

    def text(self, models: Mapping[str, Ernie]) -> dict[str, TextScores]:
        """Scores on the text, against the model called REFERENCE."""
        return score_text(models, self.windows, REFERENCE, progress=_progress)

    def __call__(self, models: Mapping[str, Ernie]) -> tuple[dict[str, TextScores], dict[str, Any]]:
        """Scores on the text, and plain numbers of text and tasks, by model."""
        text = self.text(models)
        tasks = score_tasks(models, self.tokenizer, self.items)
        return text, summarize(text, tasks, REFERENCE)


def _progress(done: int, total: int) -> None:
    print(f"window {done}/{total}", flush=True)
