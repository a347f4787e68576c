# SPDX-License-Identifier: Apache-2.0
"""What calibration gains on a real model: the table of docs/notes/calibration.md.

    python benchmarks/calibrated.py --model DIR --calibration FILE.jsonl --text FILE.jsonl \
        --tasks FILE.jsonl ...
    python benchmarks/calibrated.py ... --only "CCQ-2T 2.06, calibrated"   # others stay

Rows of the product are written by `quantize --calibration` and read back. The others replace the
expert weights of the data-free checkpoint by what their decoder would return, with the same
statistics. Windows and tasks are those of benchmarks/accuracy.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accuracy import Rows, beside_stored
from common import RESULTS, markdown, processor, put_into_doc, save_result, with_error
from gptq import GPTQ_BITS, gptq_int2
from scoring import Scoring, add_arguments

from paddle_ccq.calibration.settings import CalibrationSettings, parse_tokens
from paddle_ccq.calibration.statistics import Statistics
from paddle_ccq.calibration.text import read_calibration_text
from paddle_ccq.checkpoint.reader import Checkpoint, open_checkpoint
from paddle_ccq.codec import wint2
from paddle_ccq.codec.row_order import permute_rows, unpermute_rows
from paddle_ccq.encoder.ldlq import LDLQ_RECIPES, LdlqEncoder, LdlqRecipe
from paddle_ccq.encoder.ldlq_metric import make_metric
from paddle_ccq.evaluation.metrics import paired_difference
from paddle_ccq.host import default_threads
from paddle_ccq.models.weights import OverriddenWeights
from paddle_ccq.quantize import quantize

UNCALIBRATED, PRODUCT, GPTQ = (
    "CCQ 2.06, data-free",
    "CCQ 2.06, calibrated",
    "GPTQ int2, groups of 64",
)
MEMORY = "CCQ-2T 2.06, calibrated"
# Rows that `quantize --calibration` writes, and their formats.
WRITTEN = {PRODUCT: "wint2", MEMORY: "ccq-2t"}
DIAGONAL, FEEDBACK = "CCQ 2.06, diagonal only", "CCQ 2.06, feedback only"
# A method turns weights [N, K] and their Hessian [K, K], rows in stored order, into weights.
Method = Callable[[np.ndarray, np.ndarray], np.ndarray]


def ccq(recipe: LdlqRecipe, diagonal: bool = False) -> Method:
    encoder = LdlqEncoder("default", default_threads(), lambda name: None, None, recipe=recipe)

    def method(weight: np.ndarray, hessian: np.ndarray) -> np.ndarray:
        hessian = np.diag(np.diagonal(hessian)) if diagonal else hessian
        tensors = encoder.search(weight, make_metric(hessian, recipe.damping))
        return wint2.dequantize(wint2.Wint2Tensors(**tensors)).T

    return method


def methods() -> dict[str, tuple[float, Method]]:
    """Label -> bits a weight without what is stored once a column, and the method."""
    recipe = LDLQ_RECIPES["default"]
    without = dataclasses.replace(recipe, sweeps=0)
    return {
        DIAGONAL: (2.0625, ccq(recipe, diagonal=True)),
        FEEDBACK: (2.0625, ccq(without)),
        GPTQ: (GPTQ_BITS, gptq_int2),
    }


def decode_all(
    source: Checkpoint, statistics: Statistics, names: list[str], chosen: dict[str, Method]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, float]]:
    """Weights [in, out] of every method by name, and its seconds."""
    out: dict[str, dict[str, np.ndarray]] = {label: {} for label in chosen}
    seconds = dict.fromkeys(chosen, 0.0)
    for name in names:
        weight = source.read_out_in(name)
        rows = permute_rows(np.arange(weight.shape[1]))
        hessian = statistics.hessian(name).matrix[np.ix_(rows, rows)]
        weight = np.ascontiguousarray(weight[:, rows])
        for label, method in chosen.items():
            start = time.perf_counter()
            out[label][name] = unpermute_rows(method(weight, hessian).T)
            seconds[label] += time.perf_counter() - start
    return out, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--calibration-tokens", default="256k")
    add_arguments(parser, max_tokens=61_440)
    parser.add_argument(
        "--only", nargs="+", choices=list(WRITTEN), metavar="ROW", help="rows to measure anew"
    )
    parser.add_argument("--work", type=Path, help="keep checkpoints here and reuse them")
    args = parser.parse_args()

    source = open_checkpoint(args.model)
    scoring = Scoring(source, args)
    settings = CalibrationSettings(tokens=parse_tokens(args.calibration_tokens))
    text = read_calibration_text(args.calibration, source, settings)

    folder = args.work or Path(tempfile.mkdtemp(prefix="ccq-calibrated-"))
    folder.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    try:
        rows = Rows(source, folder)
        rows.add_source()
        if not args.only:
            add_others(rows, Statistics(source, text, settings, default_threads()), seconds)
        for label in args.only or WRITTEN:
            rows.add_written(label, open_checkpoint(written(args, label, folder, seconds)))
        scores, summary = scoring(rows.models)
    finally:
        if args.work is None:
            shutil.rmtree(folder)
    numbers = measured(rows, scores, summary, seconds)
    if args.only:
        path = RESULTS / f"calibrated_{source.path.name}.json"
        numbers = beside_stored(numbers, path, labels())
    report(source.path.name, numbers, text.tokens)


def labels() -> list[str]:
    """The table's rows in their order."""
    return ["bf16", UNCALIBRATED, *methods(), *WRITTEN]


def add_others(rows: Rows, statistics: Statistics, seconds: dict[str, float]) -> None:
    """The data-free checkpoint, and the methods that replace its experts."""
    start = time.perf_counter()
    uncalibrated = rows.write(UNCALIBRATED, "wint2", "search", -1)
    seconds[UNCALIBRATED] = time.perf_counter() - start
    rows.add_written(UNCALIBRATED, uncalibrated)
    table = methods()
    decoded, took = decode_all(
        rows.source, statistics, rows.expert_names, {k: m for k, (_, m) in table.items()}
    )
    statistics.close()
    seconds |= took
    column_bits = rows.expert_bits[UNCALIBRATED] - rows.nominal_bits[UNCALIBRATED]
    other = rows.size[UNCALIBRATED] - rows.expert_bits[UNCALIBRATED] * rows.expert_weights / 8
    for label, (bits, _) in table.items():
        whole = bits + (column_bits if label != GPTQ else 0)
        size = other + whole * rows.expert_weights / 8
        rows._add(label, OverriddenWeights(uncalibrated, decoded.pop(label)), size, whole, bits)
        print(f"{label}: {seconds[label]:.0f} s", flush=True)


def written(args: argparse.Namespace, label: str, folder: Path, seconds: dict[str, float]) -> Path:
    """The checkpoint of a row of the product; made if it is not in the folder yet."""
    out = folder / f"calibrated-{WRITTEN[label]}"
    if not out.exists():
        start = time.perf_counter()
        quantize(
            args.model,
            out,
            format=WRITTEN[label],
            calibration=args.calibration,
            calibration_tokens=args.calibration_tokens,
            wint4_end_layer=-1,
            quiet=True,
        )
        seconds[label] = time.perf_counter() - start
        print(f"{label}: {seconds[label]:.0f} s", flush=True)
    return out


def measured(rows: Rows, scores: dict, summary: dict, seconds: dict) -> dict:
    """The numbers of each row, and how others differ from the product on the same windows."""
    numbers = {
        label: {
            "nominal_bits": rows.nominal_bits[label],
            "expert_bits": rows.expert_bits[label],
            "seconds": seconds.get(label),
            "machine": f"{default_threads()} cores ({processor()})",
            **row,
        }
        for label, row in summary.items()
    }
    for other in scores if PRODUCT in scores else ():
        if other not in (PRODUCT, "bf16"):
            found = {q: paired_difference(scores[PRODUCT], scores[other], q) for q in ("nll", "kl")}
            numbers[PRODUCT].setdefault("paired", {})[other] = {
                q: [d.mean, d.error] for q, d in found.items()
            }
    return numbers


def report(name: str, numbers: dict, tokens: int) -> None:
    """Print, save and put into the docs."""
    tasks = list(numbers["bf16"]["tasks"])
    table = []
    for label, row in numbers.items():
        t = row["text"]
        bold = "**" if label in WRITTEN else ""
        table.append(
            [
                f"{bold}{label}{bold}",
                f"{row['nominal_bits']:.2f}",
                f"{row['expert_bits']:.2f}",
                with_error(t, "nll_over_reference", "+.4f"),
                with_error(t, "kl_mean", ".4f"),
                f"{t['top1_agreement']:.1%}" if "top1_agreement" in t else "",
                *(f"{row['tasks'][task]['accuracy']:.3f}" for task in tasks),
            ]
        )
    header = ["method", "bits, codes", "bits, experts", "nll - bf16", "KL", "top-1", *tasks]
    pairs = [
        [f"calibrated - {other}", *(f"{mean:+.4f} ({error:.4f})" for mean, error in d.values())]
        for other, d in numbers[PRODUCT].get("paired", {}).items()
    ]
    seconds = {label: row["seconds"] for label, row in numbers.items()}
    first = numbers["bf16"]
    note = (
        f"`{name}`, all MoE layers, dense linear layers in wint8 but for bf16;"
        f" statistics of {tokens:,} tokens; {first['text']['predicted_tokens']:,} predicted tokens"
        f" in {first['text']['windows']} windows; {first['tasks'][tasks[0]]['items']} items a task"
        " (a task accuracy of 0.9 on 200 items has a standard error of 0.021). Standard errors over"
        f" windows in brackets. `quantize --calibration` took {seconds[PRODUCT] / 60:.1f} minutes"
        f" for wint2, `quantize` {seconds[UNCALIBRATED] / 60:.1f}, on"
        f" {numbers[PRODUCT]['machine']}."
    )
    paired = markdown(["same windows; negative: calibrated wint2 is better", "nll", "KL"], pairs)
    save_result(f"calibrated_{name}", numbers)
    put_into_doc(
        "docs/notes/calibration.md",
        "calibrated",
        f"{markdown(header, table)}\n\n{paired}\n\n{note}",
    )


if __name__ == "__main__":
    main()
