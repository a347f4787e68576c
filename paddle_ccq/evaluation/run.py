# SPDX-License-Identifier: Apache-2.0
"""Evaluating several models in one pass over the same windows and task items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..host import default_threads
from ..models.ernie import Ernie
from .metrics import TextScores, paired_difference, score_window
from .tasks import TaskItem, score_items
from .text import Tokenizer

Progress = Callable[[int, int], None]  # done, total


def score_text(
    models: Mapping[str, Ernie],
    windows: Sequence[np.ndarray],
    reference: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, TextScores]:
    """Scores of all models on the same windows, read once.

    `reference` names the model that the others' KL and agreement are taken against; its own
    logits are computed once per window. One thread works on one window at a time.

    Raises:
        ValueError: if no model is named `reference`.
    """
    if reference is not None and reference not in models:
        raise ValueError(f"no model is named {reference}")
    results = []
    with ThreadPoolExecutor(threads or default_threads()) as pool:
        try:
            scored = pool.map(lambda window: score_window(window, models, reference), windows)
            for done, result in enumerate(scored, start=1):
                results.append(result)
                if progress is not None:
                    progress(done, len(windows))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: TextScores([result[name] for result in results]) for name in models}


@dataclass(frozen=True)
class TaskScore:
    """One model on one task."""

    correct: np.ndarray  # bool per item

    def summary(self) -> dict[str, float | int]:
        """Items, the share that is right, and its standard error, that of a binomial share."""
        count, accuracy = self.correct.size, float(self.correct.mean())
        error = float(np.sqrt(accuracy * (1 - accuracy) / count))
        return {"items": count, "accuracy": accuracy, "accuracy_error": error}


def score_tasks(
    models: Mapping[str, Ernie],
    tokenizer: Tokenizer,
    items: Sequence[TaskItem],
    threads: int | None = None,
) -> dict[str, dict[str, TaskScore]]:
    """Model name -> task name -> score."""
    results: dict[str, dict[str, TaskScore]] = {}
    tasks = np.array([item.task for item in items])
    order = list(dict.fromkeys(tasks.tolist()))
    with ThreadPoolExecutor(threads or default_threads()) as pool:
        try:
            for name, model in models.items():
                correct = score_items(model, tokenizer, items, run=pool.map)
                results[name] = {task: TaskScore(correct[tasks == task]) for task in order}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def summarize(
    text: Mapping[str, TextScores] | None,
    tasks: Mapping[str, Mapping[str, TaskScore]] | None,
    reference: str | None,
) -> dict[str, dict[str, Any]]:
    """Plain numbers per model, for a table or a JSON file."""
    names = list(text or tasks or {})
    result: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in names:
        if text is not None:
            result[name]["text"] = text[name].summary()
            if reference is not None and name != reference:
                difference = paired_difference(text[name], text[reference])
                result[name]["text"] |= {
                    "nll_over_reference": difference.mean,
                    "nll_over_reference_error": difference.error,
                }
        if tasks is not None:
            result[name]["tasks"] = {t: score.summary() for t, score in tasks[name].items()}
    return result
