# SPDX-License-Identifier: Apache-2.0
"""What the benchmark scripts share: tables put between markers in the docs, results as JSON."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers and stand right."""
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def put_into_doc(doc: str, marker: str, text: str) -> None:
    """Replace what stands between `<!-- table: marker -->` and `<!-- end -->` in a document.

    Raises:
        SystemExit: if the markers are missing; the table is never put elsewhere.
    """
    print(text)
    path = ROOT / doc
    begin, end = f"<!-- table: {marker} -->", "<!-- end -->"
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    content = path.read_text(encoding="utf-8")
    if not pattern.search(content):
        sys.exit(f"error: {path} has no {begin} ... {end}")
    replacement = f"{begin}\n{text}\n{end}"
    path.write_text(pattern.sub(lambda _: replacement, content, count=1), encoding="utf-8")
    print(f"wrote table '{marker}' into {doc}")


def with_error(values: dict[str, Any], key: str, form: str) -> str:
    """A number with its standard error in brackets; empty where it was not measured."""
    if key not in values:
        return ""
    return f"{values[key]:{form}} ({values[key + '_error']:.4f})"


def save_result(name: str, result: Any) -> None:
    """Keep the numbers behind a table in benchmarks/results/name.json."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")


def processor() -> str:
    """Name of the processor, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
