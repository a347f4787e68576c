# SPDX-License-Identifier: Apache-2.0
"""What each method costs a real model: the table of docs/notes/accuracy.md.

    python benchmarks/accuracy.py --model DIR --text FILE.jsonl --tasks FILE.jsonl ...
    python benchmarks/accuracy.py ... --only "CCQ-2T 2.06, default"    # one row; others stay

Rows with a file format are written by `quantize` and read back; the others replace the expert
weights of the wint8 checkpoint by what their decoder would return. Dense linears are wint8 in every
row but bf16, so that rows differ in the experts alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from baselines import RTN_BITS, SYMMETRIC_BITS, rtn_int2, symmetric_int2
from common import RESULTS, markdown, put_into_doc, save_result, with_error
from scoring import Scoring, add_arguments

from paddle_ccq.checkpoint.reader import Checkpoint, open_checkpoint
from paddle_ccq.codec import formats
from paddle_ccq.codec.weight_only import dequantize_wint8, quantize_wint8
from paddle_ccq.evaluation.metrics import paired_difference
from paddle_ccq.models.ernie import Ernie
from paddle_ccq.models.weights import OverriddenWeights
from paddle_ccq.quantize import quantize

# label, format, encoder: rows that `quantize` writes.
WRITTEN = [
    ("CCQ 2.06, paper's encoder", "wint2", "paper"),
    ("**CCQ 2.06, default**", "wint2", "search"),
    ("**CCQ-2T 2.06, default**", "ccq-2t", "search"),
    ("**CCQ 2.5, default**", "ccq-2.5", "search"),
    ("**CCQ 2.75, default**", "ccq-2.75", "search"),
]
# label, bits per weight without per-column extras, function on [N, K]: rows that replace weights.
REPLACED = [
    ("RTN int2, groups of 64", RTN_BITS, rtn_int2),
    ("plain int2, symmetric, searched scales", SYMMETRIC_BITS, symmetric_int2),
]
PAPER, OURS, PLAIN = "CCQ 2.06, paper's encoder", "CCQ 2.06, default", REPLACED[1][0]
MEMORY = "CCQ-2T 2.06, default"
# Every table has each row with all MoE layers quantized, and with the first one in wint4.
SUFFIXES = ("", ", first MoE layer wint4")


def wint8(weight: np.ndarray) -> np.ndarray:
    return dequantize_wint8(*quantize_wint8(weight.T)).T


class Rows:
    """Models of the table with their sizes; everything on disk lies in one temporary folder."""

    def __init__(self, source: Checkpoint, folder: Path) -> None:
        self.source, self.folder = source, folder
        self.models: dict[str, Ernie] = {}
        self.size: dict[str, float] = {}
        # Bits per expert weight: of codes and group scales, and with what is stored once a column.
        self.nominal_bits: dict[str, float] = {}
        self.expert_bits: dict[str, float] = {}
        config = source.config
        self.expert_names = [n for n in source.names() if ".experts." in n]
        self.expert_weights = sum(int(np.prod(source.shape(n))) for n in self.expert_names)
        self.weights = sum(int(np.prod(shape)) for shape in config.tensors.shapes.values())
        self.first_moe = config.moe_layers()[0]

    def add_source(self) -> None:
        self._add("bf16", self.source, 2 * self.weights, 16.0, 16.0)

    def write(self, label: str, format: str, encoder: str, wint4_end_layer: int) -> Checkpoint:
        target = self.folder / label.replace(" ", "-").replace(",", "")
        if not target.exists():
            quantize(
                self.source.path,
                target,
                format=format,
                encoder=encoder,
                wint4_end_layer=wint4_end_layer,
                quiet=True,
            )
        return open_checkpoint(target)

    def add_written(self, label: str, checkpoint: Checkpoint) -> None:
        bits = nominal = 0.0
        for name in self.expert_names:
            k, n = checkpoint.shape(name)
            format = checkpoint.format_of(name)
            bits += formats.stored_bits_per_weight(format, k, n) * k * n
            nominal += formats.get(format).bits_per_weight * k * n
        size = sum(f.stat().st_size for f in checkpoint.path.glob("*.safetensors"))
        self._add(
            label, checkpoint, size, bits / self.expert_weights, nominal / self.expert_weights
        )

    def add_replaced(
        self,
        label: str,
        base: Checkpoint,
        bits: float,
        function: Callable[[np.ndarray], np.ndarray],
        keep: int | None = None,
    ) -> None:
        """`keep`: a MoE layer whose experts stay as they are in `base`."""
        names = [n for n in self.expert_names if keep is None or f".layers.{keep}." not in n]
        replaced = {n: function(self.source.read_out_in(n)).T for n in names}
        count = sum(w.size for w in replaced.values())
        kept = self.expert_weights - count
        total = bits * count + (self.expert_bits["wint4"] if kept else 0) * kept
        nominal = bits * count + 4.0 * kept
        other = self.size["wint4"] - self.expert_bits["wint4"] * self.expert_weights / 8
        weights = OverriddenWeights(base, replaced)
        n = self.expert_weights
        self._add(label, weights, other + total / 8, total / n, nominal / n)

    def _add(self, label: str, source: object, size: float, bits: float, nominal: float) -> None:
        self.models[label] = Ernie(source)
        self.size[label], self.expert_bits[label] = size, bits
        self.nominal_bits[label] = nominal


def labels() -> list[str]:
    """The table's rows, most bits first."""
    rows = [*(label for label, *_ in REPLACED), *(label.strip("*") for label, *_ in WRITTEN)]
    return ["bf16", "wint8", "wint4", *(label + suffix for suffix in SUFFIXES for label in rows)]


def build(rows: Rows, chosen: Collection[str]) -> None:
    """The chosen models of the table, and bf16, which all are compared with."""
    last = rows.source.config.num_hidden_layers - 1
    rows.add_source()
    replaced = [label for label in chosen if label.startswith(tuple(r[0] for r in REPLACED))]
    if replaced or {"wint4", "wint8"} & set(chosen):
        wint4 = rows.write("wint4", "wint2", "search", last)
        rows.add_written("wint4", wint4)
        rows.add_replaced("wint8", wint4, 8.0, wint8)
    for suffix, end in zip(SUFFIXES, (-1, rows.first_moe), strict=True):
        keep = rows.first_moe if suffix else None
        for label, bits, function in REPLACED:
            if label + suffix in chosen:
                rows.add_replaced(label + suffix, wint4, bits, function, keep)
        for label, format, encoder in WRITTEN:
            label = label.strip("*") + suffix
            if label in chosen:
                rows.add_written(label, rows.write(label, format, encoder, end))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    add_arguments(parser, max_tokens=102_400)
    parser.add_argument(
        "--marker", default="accuracy", help="table of docs/notes/accuracy.md to write"
    )
    parser.add_argument(
        "--only", nargs="+", choices=labels(), metavar="ROW", help="rows to measure anew"
    )
    args = parser.parse_args()

    source = open_checkpoint(args.model)
    scoring = Scoring(source, args)

    folder = Path(tempfile.mkdtemp(prefix="ccq-accuracy-"))
    try:
        rows = Rows(source, folder)
        start = time.perf_counter()
        build(rows, args.only or labels())
        print(f"{len(rows.models)} models built in {time.perf_counter() - start:.0f} s", flush=True)
        text, summary = scoring(rows.models)
    finally:
        shutil.rmtree(folder)
    numbers = measured(rows, text, summary)
    if args.only:
        path = RESULTS / f"accuracy_{rows.source.path.name}.json"
        numbers = beside_stored(numbers, path, labels())
    report(args.marker, rows, numbers)


def measured(rows: Rows, text: dict, summary: dict) -> dict:
    """The numbers of each row, and how pairs of them differ on the same windows."""
    numbers = {
        label: {
            "nominal_bits": rows.nominal_bits[label],
            "expert_bits": rows.expert_bits[label],
            "model_bits": rows.size[label] * 8 / rows.weights,
            "megabytes": rows.size[label] / 1e6,
            **summary[label],
        }
        for label in labels()
        if label in summary
    }
    for a, b in pairs_of(numbers):
        for quantity in ("nll", "kl"):
            d = paired_difference(text[a], text[b], quantity)
            numbers[a].setdefault("paired", {}).setdefault(b, {})[quantity] = [d.mean, d.error]
    return numbers


def pairs_of(numbers: Collection[str]) -> list[tuple[str, str]]:
    """Rows that are compared window by window."""
    pairs = [(OURS + s, other + s) for s in SUFFIXES for other in (PLAIN, PAPER)]
    return [(a, b) for a, b in pairs if a in numbers and b in numbers]


def beside_stored(numbers: dict, path: Path, order: list[str]) -> dict:
    """New rows among those that are stored in `path`, in the table's order."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    same = ("windows", "predicted_tokens", "nll")
    new, old = (d["bf16"]["text"] for d in (numbers, stored))
    if any(abs(new[key] - old[key]) > 1e-4 for key in same):
        raise SystemExit(f"{path}: was measured on another text, or with other windows")
    both = stored | {label: row for label, row in numbers.items() if label != "bf16"}
    return {label: both[label] for label in order if label in both}


def report(marker: str, rows: Rows, numbers: dict) -> None:
    """Print, save and put into the docs."""
    task_names = list(next(iter(numbers.values()))["tasks"])
    table = []
    for label, row in numbers.items():
        t = row["text"]
        accuracies = [row["tasks"][task]["accuracy"] for task in task_names]
        bold = "**" if label.startswith((OURS, MEMORY)) else ""
        table.append(
            [
                f"{bold}{label}{bold}",
                f"{row['nominal_bits']:.2f}",
                f"{row['expert_bits']:.2f}",
                f"{row['model_bits']:.2f}",
                f"{row['megabytes']:.1f}",
                f"{t['perplexity']:.3f}",
                with_error(t, "nll_over_reference", "+.4f"),
                with_error(t, "kl_mean", ".4f"),
                f"{t['top1_agreement']:.1%}" if "top1_agreement" in t else "",
                *(f"{a:.3f}" for a in accuracies),
                f"{np.mean(accuracies):.3f}",
            ]
        )
    header = [
        "method",
        "bits, codes",
        "bits, experts",
        "bits, model",
        "MB",
        "ppl",
        "nll - bf16",
        "KL",
        "top-1",
    ]
    body = markdown([*header, *task_names, "mean"], table)

    pairs = [
        [f"{a} - {b}", *(f"{d[0]:+.4f} ({d[1]:.4f})" for d in numbers[a]["paired"][b].values())]
        for a, b in pairs_of(numbers)
    ]
    paired = markdown(["same windows; negative: the first is better", "nll", "KL"], pairs)

    first = next(iter(numbers.values()))
    note = (
        "Bits of codes and group scales; of experts with what is stored once a column; of the "
        f"whole model. `{rows.source.path.name}`, {rows.weights / 1e6:.1f}M weights of which "
        f"{rows.expert_weights / 1e6:.1f}M in experts; {first['text']['predicted_tokens']:,} "
        f"predicted tokens in {first['text']['windows']} windows; "
        f"{first['tasks'][task_names[0]]['items']} items a task. Standard errors over windows "
        "in brackets; that of a task accuracy of 0.9 on 200 items is 0.021."
    )
    save_result(f"accuracy_{rows.source.path.name}", numbers)
    put_into_doc("docs/notes/accuracy.md", marker, f"{body}\n\n{paired}\n\n{note}")
    if marker == "accuracy":
        write_summary(numbers)


# The README's table: label of a row, and its name in English and Chinese.
SUMMARY = [
    ("bf16", "bfloat16", "bfloat16"),
    ("wint4", "wint4 per channel", "wint4(按通道)"),
    ("RTN int2, groups of 64", "round to nearest, int2", "就近取整 int2"),
    (PLAIN, "plain int2, searched scales", "普通 int2,搜索缩放"),
    (PAPER, "CCQ, the paper's encoder", "CCQ,论文的编码器"),
    (OURS, "**CCQ, paddle-ccq**", "**CCQ,paddle-ccq**"),
    (MEMORY, "**CCQ-2T, paddle-ccq**", "**CCQ-2T,paddle-ccq**"),
    ("CCQ 2.5, default", "CCQ 2.5, paddle-ccq", "CCQ 2.5,paddle-ccq"),
    ("CCQ 2.75, default", "CCQ 2.75, paddle-ccq", "CCQ 2.75,paddle-ccq"),
]
HEADERS = {
    "README.md": ["experts", "bits", "perplexity", "KL", "top-1 same", "5 tasks, mean"],
    "README.zh.md": ["专家权重", "比特", "困惑度", "KL 散度", "top-1 一致", "5 项任务平均"],
}


def write_summary(numbers: dict) -> None:
    """The short table of both READMEs."""
    for column, (file, header) in enumerate(HEADERS.items()):
        rows = []
        for label, *names in SUMMARY:
            row = numbers[label]
            text = row["text"]
            compared = "kl_mean" in text
            rows.append(
                [
                    names[column],
                    f"{row['nominal_bits']:.2f}",
                    f"{text['perplexity']:.2f}",
                    f"{text['kl_mean']:.3f}" if compared else "",
                    f"{text['top1_agreement']:.1%}" if compared else "",
                    f"{np.mean([t['accuracy'] for t in row['tasks'].values()]):.3f}",
                ]
            )
        put_into_doc(file, "summary", markdown(header, rows))


if __name__ == "__main__":
    main()
