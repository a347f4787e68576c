# SPDX-License-Identifier: Apache-2.0
"""What allocation gains on a real model: the tables of docs/notes/allocation.md.

    python benchmarks/allocation.py --model DIR --calibration FILE.jsonl --text FILE.jsonl \
        --tasks FILE.jsonl ... --work DIR

The uniform row is written by `quantize --calibration`. The others take each layer from it or from a
checkpoint that is wint4 throughout, in the layouts that `quantize --allocate` chooses: a layer's
bytes do not depend on the formats of the others (tests/test_sensitivity.py). What lies in --work
already is used again. Windows and tasks are those of benchmarks/accuracy.py and calibrated.py.
"""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import Rows
from common import markdown, put_into_doc, save_result, with_error

from paddle_ccq.allocation.costs import PROJECTIONS, Sensitivities, load_sensitivities
from paddle_ccq.allocation.resolve import Allocation, allocate_layers
from paddle_ccq.allocation.target import parse_target
from paddle_ccq.checkpoint.reader import Checkpoint, open_checkpoint
from paddle_ccq.codec import formats
from paddle_ccq.evaluation.metrics import paired_difference
from paddle_ccq.evaluation.run import score_tasks, score_text, summarize
from paddle_ccq.evaluation.tasks import read_items
from paddle_ccq.evaluation.text import Tokenizer, cut_windows, token_stream
from paddle_ccq.models.ernie import Ernie
from paddle_ccq.models.weights import OverriddenWeights
from paddle_ccq.quantize import quantize
from paddle_ccq.sensitivity import sensitivity
from paddle_ccq.targets.fastdeploy.layout import build_plan
from paddle_ccq.texts.documents import read_documents

TARGET = "2.3bpw"
# Further points of the figure.
OTHER_TARGETS = ("2.5bpw", "3bpw")
UNIFORM = "CCQ 2.06, calibrated"
PREFIX, ALLOCATED = "calibrated, wint4 prefix", "calibrated, allocated"


def costs_of(method: str, args: argparse.Namespace) -> Sensitivities:
    """Sensitivities as the command's defaults give them, or of an earlier run."""
    path = args.work / f"{method}.json"
    if not path.exists():
        made = sensitivity(args.model, args.calibration, method=method, threads=args.threads)
        path.write_text(json.dumps(made.as_dict()), encoding="utf-8")
    return load_sensitivities(path)


def allocation_for(source: Checkpoint, target: str, costs: Sensitivities) -> Allocation:
    """Any layers in wint4, as --allow-plugin-layout has it."""
    return allocate_layers(
        parse_target(target),
        "wint2",
        source.config.moe_layers(),
        {},
        costs,
        build_plan(source.config),
        True,
    )


class Mixed:
    """Adds rows with some layers in wint4 and the others as in the uniform checkpoint."""

    def __init__(self, rows: Rows, uniform: Checkpoint, wint4: Checkpoint) -> None:
        self.rows, self.uniform, self.wint4 = rows, uniform, wint4
        self.layers: dict[str, list[int]] = {}

    def add(self, label: str, layers: list[int]) -> None:
        rows = self.rows
        taken = [n for n in rows.expert_names if int(n.split(".")[2]) in layers]
        bits = nominal = 0.0
        for name in rows.expert_names:
            k, n = self.uniform.shape(name)
            format = "wint4" if name in set(taken) else "wint2"
            bits += formats.stored_bits_per_weight(format, k, n) * k * n
            nominal += formats.get(format).bits_per_weight * k * n
        count = rows.expert_weights
        size = rows.size[UNIFORM] + (bits - rows.expert_bits[UNIFORM] * count) / 8
        weights = OverriddenWeights(self.uniform, {n: self.wint4.read(n) for n in taken})
        rows._add(label, weights, size, bits / count, nominal / count)
        self.layers[label] = layers


def scored(path: Path, mixed: Mixed, labels: list[str], score: Callable) -> dict[str, Any]:
    """Scores of these rows; what an earlier run with the same --work has scored is not repeated."""

    def key(label: str) -> str:
        return "bf16" if label == "bf16" else str(mixed.layers[label])

    known = pickle.loads(path.read_bytes()) if path.exists() else {}
    missing = {label: mixed.rows.models[label] for label in labels if key(label) not in known}
    if missing:
        known |= {key(label): found for label, found in score(missing).items()}
        path.write_bytes(pickle.dumps(known))
    return {label: known[key(label)] for label in labels}


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, for values without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tasks", nargs="+", default=[])
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=61_440)
    parser.add_argument("--threads", type=int, help="(default: all cores)")
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    source = open_checkpoint(args.model)
    tokenizer = Tokenizer(source.path, source.config.raw)
    stream = token_stream(read_documents(args.text), tokenizer)
    windows = cut_windows(stream, args.window, args.max_tokens)
    items = [item for path in args.tasks for item in read_items(path)]
    costs = {"quadratic": costs_of("quadratic", args)}

    last = source.config.num_hidden_layers - 1
    for name, more in (
        ("uniform", {"calibration": args.calibration, "wint4_end_layer": -1}),
        ("wint4", {"wint4_end_layer": last}),
    ):
        if not (args.work / name).exists():
            quantize(source.path, args.work / name, threads=args.threads, quiet=True, **more)
    uniform, wint4 = (open_checkpoint(args.work / name) for name in ("uniform", "wint4"))

    rows = Rows(source, args.work)
    rows.add_source()
    rows.add_written(UNIFORM, uniform)
    mixed = Mixed(rows, uniform, wint4)
    predicted: dict[str, float] = {}
    main_rows = ["bf16", UNIFORM]
    for target in (TARGET, *OTHER_TARGETS):
        found = allocation_for(source, target, costs["quadratic"])
        predicted[UNIFORM] = found.rows[0].loss
        for row in found.rows[1:]:
            label = PREFIX if "prefix" in row.name else ALLOCATED
            label = f"{label}, {target}"
            if target == TARGET:
                main_rows.append(label)
            mixed.add(label, row.plan.wint4_layers)
            predicted[label] = row.loss
    print(mixed.layers, flush=True)
    mixed.layers[UNIFORM] = []

    def text_of(models: dict[str, Ernie]) -> dict[str, Any]:
        return score_text(
            {"bf16": rows.models["bf16"], **models},
            windows,
            reference="bf16",
            threads=args.threads,
            progress=lambda done, total: print(f"window {done}/{total}", flush=True),
        )

    kept = args.work / f"text-{args.max_tokens}.pickle"
    scored(kept, mixed, main_rows, text_of)
    tasks: dict[str, Any] = {}
    if items:
        tasks = scored(
            args.work / "tasks.pickle",
            mixed,
            main_rows,
            lambda models: score_tasks(models, tokenizer, items, args.threads),
        )
    text = scored(kept, mixed, list(rows.models), text_of)
    summary = summarize(text, None, "bf16")
    for label, row in summarize(None, tasks or None, "bf16").items():
        summary[label] |= row
    costs["kl"] = costs_of("kl", args)
    report(rows, mixed, text, summary, predicted, costs)


def report(
    rows: Rows,
    mixed: Mixed,
    scores: dict,
    summary: dict,
    predicted: dict[str, float],
    costs: dict[str, Sensitivities],
) -> None:
    """Print, save and put into the docs."""
    names = list(summary["bf16"].get("tasks", {}))
    table, numbers = [], {}
    for label, row in summary.items():
        t = row["text"]
        numbers[label] = {
            "nominal_bits": rows.nominal_bits[label],
            "expert_bits": rows.expert_bits[label],
            "wint4_layers": mixed.layers.get(label, []),
            "predicted_kl": predicted.get(label),
            **row,
        }
        bold = "**" if label == f"{ALLOCATED}, {TARGET}" else ""
        layers = mixed.layers.get(label)
        table.append(
            [
                f"{bold}{label}{bold}",
                "" if label == "bf16" else ", ".join(map(str, layers or [])) or "none",
                f"{rows.nominal_bits[label]:.2f}",
                f"{rows.expert_bits[label]:.2f}",
                with_error(t, "nll_over_reference", "+.4f"),
                with_error(t, "kl_mean", ".4f"),
                f"{predicted[label]:.4f}" if label in predicted else "",
                f"{t['top1_agreement']:.1%}" if "top1_agreement" in t else "",
                *(f"{row['tasks'][n]['accuracy']:.3f}" if "tasks" in row else "" for n in names),
            ]
        )
    header = ["method", "wint4 layers", "bits, codes", "bits, experts", "nll - bf16", "KL"]
    body = markdown([*header, "KL, predicted", "top-1", *names], table)

    pairs = []
    for target in (TARGET, *OTHER_TARGETS):
        a, b = f"{ALLOCATED}, {target}", f"{PREFIX}, {target}"
        found = {q: paired_difference(scores[a], scores[b], q) for q in ("nll", "kl")}
        pairs.append(
            [f"{target}: allocated - prefix"]
            + [f"{d.mean:+.4f} ({d.error:.4f})" for d in found.values()]
        )
        numbers[a]["paired"] = {b: {q: [d.mean, d.error] for q, d in found.items()}}
    a = f"{ALLOCATED}, {TARGET}"
    found = {q: paired_difference(scores[a], scores[UNIFORM], q) for q in ("nll", "kl")}
    pairs.append(
        [f"{TARGET}: allocated - uniform"]
        + [f"{d.mean:+.4f} ({d.error:.4f})" for d in found.values()]
    )
    numbers[a]["paired"][UNIFORM] = {q: [d.mean, d.error] for q, d in found.items()}
    paired = markdown(["same windows; negative: allocated is better", "nll", "KL"], pairs)
    first = summary["bf16"]
    done = f"; {first['tasks'][names[0]]['items']} items a task, for {TARGET} only" if names else ""
    note = (
        f"`{rows.source.path.name}`, dense linear layers in wint8 but for bf16; layers chosen by"
        f" the quadratic costs; {first['text']['predicted_tokens']:,} predicted tokens in"
        f" {first['text']['windows']} windows{done}. Standard errors over windows in brackets."
    )
    save_result(f"allocation_{rows.source.path.name}", numbers)
    put_into_doc("docs/notes/allocation.md", "allocation", f"{body}\n\n{paired}\n\n{note}")
    put_into_doc("docs/notes/allocation.md", "sensitivity", sensitivity_table(costs))


def sensitivity_table(costs: dict[str, Sensitivities]) -> str:
    """Both methods side by side, and how well the estimate ranks."""
    exact, estimate = costs["kl"], costs["quadratic"]
    shown = [f for f in exact.formats if f in estimate.formats]
    table = []
    for layer in exact.costs:
        cells = [f"{layer}"]
        for found in (exact, estimate):
            for projection in PROJECTIONS:
                cells += [f"{found.costs[layer][projection][f]:.4f}" for f in shown]
        table.append(cells)
    header = ["layer"]
    for method in ("KL", "est."):
        for projection in ("up_gate", "down"):
            header += [f"{method} {projection} {f}" for f in shown]
    lines = []
    for f in shown:
        layers = [[c.layer(n, f) for n in exact.costs] for c in (exact, estimate)]
        parts = [
            [c.costs[n][p][f] for n in exact.costs for p in PROJECTIONS] for c in (exact, estimate)
        ]
        lines.append(
            [
                f,
                f"{rank_correlation(*layers):.2f}",
                f"{rank_correlation(*parts):.2f}",
                f"{sum(layers[1]) / sum(layers[0]):.2f}",
            ]
        )
    gains = [
        [c.layer(n, "wint2") - c.layer(n, "wint4") for n in exact.costs] for c in (exact, estimate)
    ]
    total = f"{sum(gains[1]) / sum(gains[0]):.2f}"
    lines.append(["gain of wint4 over wint2", f"{rank_correlation(*gains):.2f}", "", total])
    ranks = markdown(["rank correlation", "of layers", "of parts", "sum, estimate / KL"], lines)
    return f"{markdown(header, table)}\n\n{ranks}"


if __name__ == "__main__":
    main()
