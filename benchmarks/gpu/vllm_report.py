# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/notes/vllm.md from benchmarks/results/vllm_engine_h200.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import RESULTS, markdown, put_into_doc

DOC = "docs/notes/vllm.md"
RATE = 4.54e12  # bytes a second that a read reaches on this card
MATRICES = {
    "qkv": (8192, 10240),
    "o": (8192, 8192),
    "up_gate": (8192, 57344),
    "down": (28672, 8192),
}
# What the issue of this engine asked for.
GOALS = {"decode": {"1": 120, "8": 380, "32": 1100, "64": 1800}}


def quality(results: dict[str, Any]) -> str:
    rows = [
        [
            row["name"] + (", graphs" if row["graphs"] else ""),
            f"{row['reference']:.5f}",
            f"{row['nll']:.5f}",
            f"{row['nll'] - row['reference']:+.5f}",
            f"{row['mean_difference']:.4f}",
            f"{row['greedy_agreement']:.1%}",
        ]
        for row in results["quality"]
    ]
    header = ["checkpoint", "float32, CPU", "vLLM", "difference", "mean dlogp", "greedy"]
    return markdown(header, rows)


def linear(results: dict[str, Any]) -> str:
    found = results["linear"]["microseconds"]
    rows = []
    for name, (k, n) in MATRICES.items():
        row = [f"{name} [{k}, {n}]"]
        for count in (1, 8, 16, 32, 64, 128):
            time = found[f"{name} {count} stored"]
            row.append(f"{time:.1f} ({k * n / time / 1e-6 / RATE:.0%})")
        rows.append(row)
    return markdown(["matrix", *(f"{c} rows" for c in (1, 8, 16, 32, 64, 128))], rows)


def speed(results: dict[str, Any]) -> str:
    rows = []
    for key, label in (("speed", "all MoE layers WINT2"), ("speed_prefix", "wint4 prefix")):
        run = results[key]
        decode = [f"{run['decode'][batch]:.0f}" for batch in GOALS["decode"]]
        first = [run["first_token"].get(tokens) for tokens in ("1024", "8192")]
        rows.append([label, *decode, *(f"{t:.2f}" if t else "" for t in first)])
    header = [
        "300B's shape",
        *(f"batch {b}" for b in GOALS["decode"]),
        "1k first, s",
        "8k first, s",
    ]
    goals = [str(value) for value in GOALS["decode"].values()]
    return markdown(header, [*rows, ["wanted", *goals, "0.20", "1.30"]])


def main() -> int:
    results = json.loads((RESULTS / "vllm_engine_h200.json").read_text(encoding="utf-8"))
    for marker, table in (("quality", quality), ("linear", linear), ("speed", speed)):
        put_into_doc(DOC, f"vllm-{marker}", table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
