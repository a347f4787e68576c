# SPDX-License-Identifier: Apache-2.0
"""Loss against bits per weight for all methods: docs/notes/loss-by-bits.svg and a table.

    python benchmarks/figure.py --model ernie-45-moe-42m

Reads every benchmarks/results/*_MODEL.json that holds methods measured on the same text, so run it
again after any of the benchmarks that write them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, markdown, put_into_doc, with_error

FIGURE = ROOT / "docs" / "notes" / "loss-by-bits.svg"
# How a method's label begins -> the series it belongs to, first match; a series is one line.
SERIES = (
    (r"CCQ-2T", "CCQ-2T: data-free, calibrated, tuned"),
    (r"calibrated, allocated", "calibrated, allocated layers"),
    (r"calibrated, wint4 prefix", "calibrated, wint4 prefix"),
    (r"CCQ 2\.06, calibrated$", "calibrated"),
    (r"calibrated by gradients and tuned", "calibrated by gradients and tuned"),
    (r".*tuned", "calibrated and tuned"),
    (r"calibrated by gradients", "calibrated by gradients"),
    (r"CCQ 2\.06, paper's encoder", "paper's encoder"),
    (r"CCQ [\d.]+, default$", "data-free"),
    (r"CCQ [\d.]+, default, first MoE layer wint4", "data-free, first MoE layer wint4"),
    (r"RTN", "RTN int2"),
    (r"plain int2", "plain int2"),
    (r"GPTQ", "GPTQ int2"),
    (r"wint4$", "wint4"),
)
# Both lead from calibrated wint2 in all layers to wint4 in all.
BETWEEN = ("calibrated, allocated layers", "calibrated, wint4 prefix")
ENDS = ("calibrated", "wint4")
# Variants that other tables take apart; rows at 8 bits and above would squeeze the rest.
LEFT_OUT = re.compile(r"CCQ 2\.06, (diagonal only|feedback only)$|calibrated on all$|wint8$|bf16$")
# Another table's name of a row that is there already.
TWICE = ("CCQ 2.06, data-free",)


def collect(model: str) -> dict[str, dict[str, Any]]:
    """Methods by label from all result files of a model.

    Raises:
        SystemExit: if two files were measured on different tokens.
    """
    found: dict[str, dict[str, Any]] = {}
    reference: tuple[str, dict[str, Any]] | None = None
    for path in sorted(RESULTS.glob(f"*_{model}.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = {
            label: row
            for label, row in content.items()
            if isinstance(row, dict) and "nominal_bits" in row and "text" in row
        }
        bf16 = rows.get("bf16", {}).get("text")
        if not rows or bf16 is None:
            print(f"{path.name}: no methods beside bf16; passed over")
            continue
        if reference is None:
            reference = path.name, bf16
        same = bf16["predicted_tokens"] == reference[1]["predicted_tokens"] and math.isclose(
            bf16["nll"], reference[1]["nll"], abs_tol=1e-4
        )
        if not same:
            sys.exit(f"error: {path.name} and {reference[0]} were measured on different tokens")
        for label, row in rows.items():
            if label not in TWICE:
                found.setdefault(label, row)
    if len(found) < 2:
        sys.exit(f"error: no results for {model} in {RESULTS}")
    return found


def series_of(label: str) -> str | None:
    """The line that a method belongs to; its own where none fits."""
    if LEFT_OUT.search(label):
        return None
    return next((name for pattern, name in SERIES if re.match(pattern, label)), label)


def draw(found: dict[str, dict[str, Any]], model: str, path: Path) -> None:
    """KL on a logarithmic axis against bits of codes and group scales."""
    import matplotlib

    matplotlib.use("Agg")
    # Same results, same file.
    matplotlib.rcParams["svg.hashsalt"] = "paddle-ccq"
    import matplotlib.pyplot as pyplot

    lines: dict[str, list[tuple[float, float, float]]] = {}
    for label, row in found.items():
        name = series_of(label)
        text = row["text"]
        if name and "kl_mean" in text:
            point = (row["nominal_bits"], text["kl_mean"], text["kl_mean_error"])
            lines.setdefault(name, []).append(point)
    for name in BETWEEN:
        if name in lines:
            lines[name] += [point for end in ENDS for point in lines.get(end, [])]
    figure, axes = pyplot.subplots(figsize=(7.5, 5))
    markers = "os^vD<>pPX*h"
    for i, (name, points) in enumerate(lines.items()):
        points = sorted(set(points))
        bits, kl, errors = zip(*points, strict=True)
        axes.errorbar(
            bits,
            kl,
            yerr=errors,
            label=name,
            marker=markers[i % len(markers)],
            markersize=5,
            linewidth=1.2 if len(points) > 1 else 0,
            elinewidth=0.8,
            capsize=2,
            zorder=3 if name in ENDS else 2,
        )
    axes.set_yscale("log")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(lambda value, _: f"{value:g}")
    axes.set_xlabel("bits per expert weight (codes and group scales)")
    axes.set_ylabel("KL(bf16 || method), nats a token")
    axes.set_title(f"{model}: loss against bits", loc="left", fontsize=11)
    axes.grid(True, which="both", linewidth=0.3, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    print(f"wrote {path.relative_to(ROOT)}: {len(lines)} series")


def table(found: dict[str, dict[str, Any]]) -> str:
    """All methods by bits, then by loss."""
    tasks = list(found["bf16"].get("tasks", {}))
    rows = []
    for label, row in sorted(
        found.items(), key=lambda f: (f[1]["nominal_bits"], f[1]["text"].get("kl_mean", 0.0))
    ):
        text, done = row["text"], row.get("tasks", {})
        rows.append(
            [
                label,
                f"{row['nominal_bits']:.2f}",
                f"{row['expert_bits']:.2f}",
                with_error(text, "nll_over_reference", "+.4f"),
                with_error(text, "kl_mean", ".4f"),
                f"{text['top1_agreement']:.1%}" if "top1_agreement" in text else "",
                *(f"{done[t]['accuracy']:.3f}" if t in done else "" for t in tasks),
            ]
        )
    header = ["method", "bits, codes", "bits, experts", "nll - bf16", "KL", "top-1", *tasks]
    return markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="name, as result files end in it")
    args = parser.parse_args()
    found = collect(args.model)
    draw(found, args.model, FIGURE)
    put_into_doc("docs/notes/accuracy.md", "all methods", table(found))


if __name__ == "__main__":
    main()
