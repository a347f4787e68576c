# SPDX-License-Identifier: Apache-2.0
"""Choices of calibrated encoding and of tuning, each measured on held-out calibration text.

    PADDLE_CCQ_GPU_LIBRARY=/tmp/libccq.so PYTHONPATH=. python benchmarks/gpu/choices.py \
        --model DIR --calibration FILE.jsonl --made MADE.jsonl --json choices.json   # on a GPU
    python benchmarks/gpu/choices.py --write choices.json                # the tables of the docs

Minutes on a GPU, where the product's way takes an hour a row on two cores; so it is PyTorch that
runs the model here, and the product's search that chooses codes. One document in eighteen is held
out and nothing else is measured on: no validation text is read. `--made` is the model's own text.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from choices_list import CODES, TUNED_CODES, TUNING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import markdown, put_into_doc

HELD_OUT, WINDOW = 18, 1024


def texts(model: Path, calibration: Path, made: Path | None) -> dict[str, np.ndarray]:
    """Windows of tokens: those held out, and the parts of Choice."""
    from paddle_ccq.checkpoint.reader import open_checkpoint
    from paddle_ccq.evaluation.text import Tokenizer, token_stream
    from paddle_ccq.texts.documents import read_documents

    source = open_checkpoint(model)
    tokenizer = Tokenizer(source.path, source.config.raw)

    def windows(documents: Iterable[str]) -> np.ndarray:
        stream = np.asarray(token_stream(list(documents), tokenizer), np.int64)
        return stream[: stream.size // WINDOW * WINDOW].reshape(-1, WINDOW)

    documents = list(read_documents(calibration))
    held = [d for i, d in enumerate(documents) if i % HELD_OUT == HELD_OUT // 2]
    learned = windows(d for i, d in enumerate(documents) if i % HELD_OUT != HELD_OUT // 2)
    first = np.unique(np.linspace(0, len(learned) - 1, 256).round().astype(int))
    others = np.setdiff1d(np.arange(len(learned)), first)
    found = {"held out": windows(held), "a": learned[first], "b": learned[others]}
    return found if made is None else found | {"m": windows(read_documents(made))[:128]}


def arguments(description: str) -> argparse.ArgumentParser:
    """Those of this script, which trellis.py has too."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--made", type=Path, help="text that the model made up (sample)")
    parser.add_argument("--json", type=Path, help="the result, as far as it is there")
    parser.add_argument("--write", type=Path, help="put the tables of a run into the docs")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no row after these")
    return parser


def parsed(parser: argparse.ArgumentParser, *needed: str) -> argparse.Namespace:
    """The arguments; those that a measurement needs are there, or --write."""
    args = parser.parse_args()
    missing = [f"--{name}" for name in needed if getattr(args, name) is None]
    if missing and not args.write:
        parser.error(f"a measurement needs {', '.join(missing)}")
    return args


def main() -> None:
    args = parsed(arguments(__doc__.splitlines()[0]), "model", "calibration", "made")
    if args.write:
        write(json.loads(args.write.read_text(encoding="utf-8")))
        return
    from choices_run import Lab

    start = time.perf_counter()
    lab = Lab(args.model, texts(args.model, args.calibration, args.made))
    result = {"device": lab.device_name, "model": args.model.name, "codes": {}, "tuning": {}}

    def row(part: str, label: str, make: Callable[[], dict]) -> None:
        if time.perf_counter() - start > args.seconds:
            print(f"no time left for: {label}", flush=True)
            return
        began = time.perf_counter()
        result[part][label] = {k: v.tolist() for k, v in make().items()}
        found = result[part][label]
        print(
            f"[{time.perf_counter() - start:6.1f}] {label}: KL {np.mean(found['kl']):.4f}, nll"
            f" {np.mean(found['nll']):+.4f} ({time.perf_counter() - began:.1f} s)",
            flush=True,
        )
        if args.json:
            args.json.write_text(json.dumps(result), encoding="utf-8")

    for label, choice in CODES.items():
        row("codes", label, lambda choice=choice, label=label: lab.encoded(label, choice))
    for label, way in TUNING.items():
        row("tuning", label, lambda way=way: lab.tuned(TUNED_CODES, way))


def write(result: dict) -> None:
    """The two tables, with paired differences to their first rows."""

    def cells(found: dict, base: dict | None) -> list[str]:
        def mean(values: np.ndarray) -> str:
            error = values.std(ddof=1) / math.sqrt(len(values))
            return f"{values.mean():+.4f} ({error:.4f})"

        kl, nll = np.array(found["kl"]), np.array(found["nll"])
        shown = [f"{nll.mean():+.4f}", f"{kl.mean():.4f}", f"{np.mean(found['top1']):.1%}"]
        if base is None:
            return [*shown, "", ""]
        return [*shown, mean(nll - np.array(base["nll"])), mean(kl - np.array(base["kl"]))]

    for part, doc, first in (
        ("codes", "docs/notes/calibration.md", next(iter(CODES))),
        ("tuning", "docs/notes/tuning.md", None),
    ):
        codes = result["codes"]
        base = codes[first] if first else codes[TUNED_CODES]
        rows = [[first or "before", *cells(base, None)]]
        rows += [[n, *cells(f, base)] for n, f in result[part].items() if f is not base]
        windows = len(base["kl"])
        note = (
            f"`{result['model']}`, {windows} windows of {WINDOW} tokens of the calibration text,"
            " which no row saw; differences on the same windows with standard errors; one run,"
            f" {result['device']}."
        )
        what = "codes" if first else "tuning"
        header = [what, "nll - bf16", "KL", "top-1", "nll, difference", "KL, difference"]
        put_into_doc(doc, f"{part}-choices", f"{markdown(header, rows)}\n\n{note}")


if __name__ == "__main__":
    main()
