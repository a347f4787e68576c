# SPDX-License-Identifier: Apache-2.0
"""The results as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from ..errors import visible

# Heading, key in a summary, format.
QUANTITIES = (
    ("perplexity", "perplexity", ".3f"),
    ("nll", "nll", ".4f"),
    ("nll - reference", "nll_over_reference", "+.4f"),
    ("KL mean", "kl_mean", ".4f"),
    ("KL p99", "kl_p99", ".3f"),
    ("top-1 same", "top1_agreement", ".1%"),
)


def comparison_table(results: Mapping[str, Mapping[str, Any]], title: str = "") -> Table:
    """One row per model, from `run.summarize`: for comparing many."""
    table = _table("model", title)
    cells = _cells(results)
    for heading in cells:
        table.add_column(visible(heading), justify="right")
    for index, name in enumerate(results):
        table.add_row(visible(name), *(column[index] for column in cells.values()))
    return table


def detail_table(results: Mapping[str, Mapping[str, Any]], title: str = "") -> Table:
    """One column per model: for one or two."""
    table = _table("", title)
    for name in results:
        table.add_column(visible(name), justify="right")
    for heading, column in _cells(results).items():
        table.add_row(visible(heading), *column)
    return table


def _table(corner: str, title: str) -> Table:
    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column(corner, overflow="fold")
    return table


def _cells(results: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Heading -> one text per model; standard errors stand in brackets."""
    texts = [row.get("text", {}) for row in results.values()]
    tasks = [row.get("tasks", {}) for row in results.values()]
    columns: dict[str, list[str]] = {}
    for heading, key, form in QUANTITIES:
        if any(key in text for text in texts):
            columns[heading] = [_number(text, key, form) for text in texts]
    for task in dict.fromkeys(name for row in tasks for name in row):
        columns[task] = [_number(row.get(task, {}), "accuracy", ".3f") for row in tasks]
    return columns


def _number(values: Mapping[str, Any], key: str, form: str) -> str:
    value, error = values.get(key), values.get(f"{key}_error")
    if value is None:
        return "-"
    text = format(value, form)
    return text if error is None else f"{text} ({format(error, form.lstrip('+'))})"
