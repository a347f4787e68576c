# SPDX-License-Identifier: Apache-2.0
"""Results of moe_gemm.py as lines, as tables and as a plot; also from a JSON file it wrote.

python benchmarks/gpu/report.py RESULT.json [--markdown] [--plot OUT.svg] [--write]

Several results of one machine make one table; --write puts it and the figure into
docs/notes/kernels.md, --write-ccq-2t the table of CCQ-2T into docs/notes/kernels-ccq-2t.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LABELS = {
    "ccq": "WINT2, this project", "ccq-2t": "CCQ-2T", "humming-int2": "Humming int2 g64",
    "humming-int4": "Humming int4 g128", "marlin-w4": "Marlin W4A16 (vLLM)",
    "triton-wint2": "Triton WINT2", "triton-w4": "Triton W4A16", "triton-w8": "Triton W8A16",
    "cublas-bf16": "cuBLAS bf16", "ccq-2.5": "2.5 bits, stored", "ccq-2.75": "2.75 bits, stored",
}  # fmt: skip


def heading(result: dict) -> str:
    """The device and what it gives."""
    r = result["rates"]
    sustained = f", {r['sustained']:.0f} under lasting load" if "sustained" in r else ""
    return (
        f"{result['device']}, torch {result['torch']}: copy {r['copy']:.2f}, add {r['add']:.2f}, "
        f"read {r['read']:.2f} TB/s; dense bf16 {r['dense']:.0f} TFLOP/s"
        f"{sustained}; "
        f"an empty kernel in a graph {r['empty_us']:.2f} us"
    )


def line(row: dict) -> str:
    """One measurement, as it is made."""
    return (
        f"{row['shape']:20s} {row['who']:12s} {row['pairs'][:3]} v{row['variant']:2d} "
        f"t {row['tokens']:5d} hit {row['experts_hit']:5.1f} {row['us']:9.1f} us "
        f"{row['GBps']:6.0f} GB/s {row['percent']:5.1f} % (roof {row['roof_us']:6.1f}) "
        f"{row['TFLOPs']:6.1f} TF"
    )


def block_line(row: dict) -> str:
    """One measurement of the whole block."""
    verdict = "within" if row["us"] <= row["limit_us"] else "above"
    return (
        f"{row['shape']:22s} t {row['tokens']:3d} {row['us']:8.1f} us = up {row['up_us']:.1f} + "
        f"down {row['down_us']:.1f} + rest {row['rest_us']:.1f}; roofs {row['roofs_us']:.1f}, "
        f"{verdict} the limit of {row['limit_us']:.1f} us"
    )


def block_markdown(result: dict) -> str:
    """The whole block's table for a document."""
    lines = ["| shape | tokens | µs | up | down | rest | 1.2 roofs + 8 µs |"]
    lines.append("|---|" + "---:|" * 6)
    for r in result["block"]:
        cells = [r["shape"], str(r["tokens"])]
        cells += [f"{r[k]:.1f}" for k in ("us", "up_us", "down_us", "rest_us", "limit_us")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cases(rows: Iterable[dict]) -> dict[tuple, dict[str, dict]]:
    """(shape, pairs, tokens) -> contestant -> its row; the fastest variant counts."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        case = found.setdefault((row["shape"], row["pairs"], row["tokens"]), {})
        best = case.get(row["who"])
        if best is None or row["us"] < best["us"]:
            case[row["who"]] = row
    return found


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    """Header and cells: ours, then every peer's time and how many times longer it takes."""
    found = cases(result["gemm"])
    who = [w for w in LABELS if w != "ccq" and any(w in case for case in found.values())]
    header = ["shape", "tokens", "hit", "µs", "GB/s", "of roof", "TFLOP/s", "of dense"]
    header += [f"{LABELS[w]} µs (x)" for w in who]
    cells = []
    for (shape, pairs, tokens), case in found.items():
        ours = case.get("ccq")
        if ours is None:
            continue
        rates = result["rates"]
        share = 100 * ours["TFLOPs"] / rates.get("sustained", rates["dense"])
        row = [shape + ("" if pairs == "integer" else ", general"), str(tokens)]
        row += [f"{ours['experts_hit']:.0f}", f"{ours['us']:.1f}", f"{ours['GBps']:.0f}"]
        row += [f"{ours['percent']:.0f} %", f"{ours['TFLOPs']:.1f}", f"{share:.0f} %"]
        for w in who:
            peer = case.get(w)
            row.append(f"{peer['us']:.1f} ({peer['us'] / ours['us']:.2f})" if peer else "")
        cells.append(row)
    return header, cells


def text(result: dict) -> str:
    """The table in columns of equal width."""
    header, cells = table(result)
    width = [max(len(r[i]) for r in [header, *cells]) for i in range(len(header))]
    lines = []
    for row in [header, *cells]:
        rest = (cell.rjust(w) for cell, w in zip(row[1:], width[1:], strict=True))
        lines.append("  ".join([row[0].ljust(width[0]), *rest]))
    return "\n".join(lines)


def markdown(result: dict) -> str:
    """The table for a document."""
    header, cells = table(result)
    rule = "|---|" + "---:|" * (len(header) - 1)
    return "\n".join(["| " + " | ".join(r) + " |" for r in (header,)] + [rule]
                     + ["| " + " | ".join(r) + " |" for r in cells])  # fmt: skip


def general_markdown(result: dict) -> str:
    """General pairs beside integer ones, for a document: µs, and how many times as long."""
    found = cases(r for r in result["gemm"] if r["who"] == "ccq")
    times = {case: each["ccq"]["us"] for case, each in found.items()}
    shapes = list(dict.fromkeys(shape for shape, pairs, _ in times if pairs == "general"))
    tokens = sorted({t for _, pairs, t in times if pairs == "general"})
    names = (f"{t} tokens" if t > 1 else "1 token" for t in tokens)
    lines = ["| shape | " + " | ".join(names) + " |"]
    lines.append("|---|" + "---:|" * len(tokens))
    for shape in shapes:
        cells = [shape]
        for t in tokens:
            own, other = (times.get((shape, pairs, t)) for pairs in ("general", "integer"))
            cells.append(f"{own:.1f} ({own / other:.2f})" if own and other else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def trellis_markdown(result: dict) -> str:
    """CCQ-2T beside WINT2, for a document."""
    lines = ["| shape | tokens | CCQ-2T | of roof | WINT2 | CCQ-2T / WINT2 |"]
    lines.append("|---|" + "---:|" * 5)
    for (shape, _, tokens), case in cases(result["gemm"]).items():
        if "ccq" not in case or "ccq-2t" not in case:
            continue
        own, other = case["ccq-2t"], case["ccq"]
        cells = [shape, str(tokens), f"{own['us']:.1f}", f"{own['percent']:.0f} %"]
        cells += [f"{other['us']:.1f}", f"{own['us'] / other['us']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def can_plot() -> bool:
    """Matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(result: dict, path: str) -> None:
    """Time over tokens, one panel a shape, one line a contestant, and the roof."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = cases(r for r in result["gemm"] if r["pairs"] == "integer" and r["experts_hit"] > 1)
    shapes = list(dict.fromkeys(shape for shape, _, _ in found))
    if not shapes:
        raise SystemExit("error: --plot: no grouped GEMM was measured")
    columns = min(2, len(shapes))
    grid = (-(-len(shapes) // columns), columns)
    figure, axes = pyplot.subplots(*grid, figsize=(6 * columns, 4 * grid[0]), squeeze=False)
    for axis in axes.flat[len(shapes) :]:
        axis.remove()
    for axis, shape in zip(axes.flat, shapes, strict=False):
        rows = [case for (s, _, _), case in found.items() if s == shape]
        for who, label in LABELS.items():
            points: list[Any] = [case[who] for case in rows if who in case]
            if points:
                style = {"linewidth": 2.5, "color": "black"} if who == "ccq" else {"marker": "."}
                axis.plot([p["tokens"] for p in points], [p["us"] for p in points],
                          label=label, **style)  # fmt: skip
        ours = [case["ccq"] for case in rows if "ccq" in case]
        axis.plot([p["tokens"] for p in ours], [p["roof_us"] for p in ours], "--", color="gray",
                  label=f"roof at 2.06 bits, {result['rates']['read']:.1f} TB/s")  # fmt: skip
        axis.set(title=shape, xscale="log", yscale="log", xlabel="tokens", ylabel="µs")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.suptitle(f"Grouped GEMM, top-8, bf16 activations, {result['device']}")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Print, and draw if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", nargs="+")
    parser.add_argument("--write", action="store_true", help="into docs/notes/kernels.md")
    parser.add_argument("--write-ccq-2t", action="store_true", help="into kernels-ccq-2t.md")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--plot", metavar="SVG")
    args = parser.parse_args()
    result, *others = [json.loads(Path(name).read_text()) for name in args.result]
    for other in others:
        result["gemm"] += other["gemm"]
        result["block"] += other["block"]
    print(heading(result))
    print(markdown(result) if args.markdown else text(result))
    for row in result["block"]:
        print(block_line(row))
    if args.plot:
        plot(result, args.plot)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import ROOT, put_into_doc

    if args.write_ccq_2t:
        content = f"{heading(result)}.\n\n{trellis_markdown(result)}"
        put_into_doc("docs/notes/kernels-ccq-2t.md", "ccq-2t", content)
    if args.write:
        note = heading(result) + "."
        integer = {**result, "gemm": [r for r in result["gemm"] if r["pairs"] == "integer"]}
        put_into_doc("docs/notes/kernels.md", "moe_gemm", f"{note}\n\n{markdown(integer)}")
        if len(integer["gemm"]) < len(result["gemm"]):
            put_into_doc("docs/notes/kernels.md", "general pairs", general_markdown(result))
        put_into_doc("docs/notes/kernels.md", "moe_block", block_markdown(result))
        plot(result, str(ROOT / "docs" / "notes" / "kernels.svg"))


if __name__ == "__main__":
    main()
