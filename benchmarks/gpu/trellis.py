# SPDX-License-Identifier: Apache-2.0
"""Choices of calibrated ccq-2t and what could be done beyond, each on held-out calibration text.

    PADDLE_CCQ_GPU_LIBRARY=/tmp/libccq.so PYTHONPATH=. python benchmarks/gpu/trellis.py \
        --model DIR --calibration FILE.jsonl --text VALIDATION.jsonl --json trellis.json  # on a GPU
    python benchmarks/gpu/trellis.py --write trellis.json                # the tables of the docs

As choices.py, for codes with a memory. EXL3's codes come from exllamav3's own quantizer, where that
package is installed. Rows are chosen by held-out calibration text; validation text is read for the
comparison with EXL3 and for rows that were chosen before.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from choices import arguments, parsed, texts

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import markdown, put_into_doc

HELD, VALIDATION = "held out", "val"
BASE = "router, 256k tokens, default"
TUNED = ", tuned on all"  # in a row's label, after that of its codes


def rows(lab: Any) -> dict[str, Callable[[], tuple[Any, Any]]]:
    """Label -> what makes (codes or None, weights); a row may need one before it."""
    from choices_list import ALL, Way
    from trellis_run import TRELLIS_LDLQ_RECIPES, Choice, Relaxation

    default, best = (TRELLIS_LDLQ_RECIPES[name] for name in ("default", "best"))
    router, plain, made = Choice("ab", "router"), "gradient, default", "gradient and made-up, best"

    def codes(choice: Choice):
        def make():
            found = lab.encoded(choice)
            return found, lab.with_codes(found)

        return make

    def from_codes(label: str, change: Callable[[Any], Any]):
        def make():
            found = change(lab.codes[label])
            return found, lab.with_codes(found)

        return make

    def relaxed(label: str, way: Relaxation):
        return from_codes(label, lambda found: lab.relaxed(found, way))

    def gain(label: str, weights: str):
        return from_codes(label, lambda found: lab.gain_in_down(found, weights))

    def tuned(label: str, way: Way, made: bool = False):
        return lambda: (None, lab.tuned(lab.codes[label], way, made))

    return {
        "EXL3, 2 bits, router": lambda: (None, lab.exl3(router, mul1=True)),
        BASE: codes(Choice("a", "router")),
        "router, default": codes(router),
        plain: codes(Choice()),
        "gradient, gain in down": gain(plain, "gradient"),
        "gradient, best": codes(Choice(recipe=best)),
        "gradient, default, tuned on all": tuned(plain, Way(ALL)),
        "gradient, best, tuned on all": tuned("gradient, best", Way(ALL)),
        "gradient, super scales by layer": relaxed(plain, Relaxation(count=1, moved=1, steps=600)),
        "gradient, relaxed": relaxed(plain, Relaxation()),
        "gradient, relaxed, single bytes": relaxed(plain, Relaxation(moved=1)),
        "gradient, 3 sweeps": codes(Choice(recipe=replace(default, sweeps=3))),
        "EXL3, 2 bits, gradient": lambda: (None, lab.exl3(Choice(), mul1=True)),
        "gradient, relaxed, tuned on all": tuned("gradient, relaxed", Way(ALL)),
        "gradient, best, tuned on all, twice": tuned("gradient, best", Way(ALL, passes=2)),
        "gradient, best, tuned on all, four times": tuned("gradient, best", Way(ALL, passes=4)),
        made: codes(Choice("abm", recipe=best)),
        f"{made}, tuned on all, twice": tuned(made, Way(ALL, passes=2), made=True),
        "gradient, default, tuned on all, twice": tuned(plain, Way(ALL, passes=2)),
        "gradient, gain in down, tuned on all": tuned("gradient, gain in down", Way(ALL)),
        "gradient, two super scales": codes(Choice(recipe=replace(default, kappas=(11.0, 9.0)))),
        "gradient, window -2 .. 3": codes(Choice(recipe=replace(default, window=(-2, 3)))),
        "gradient, relaxed, three rounds": relaxed(plain, Relaxation(phases=(0, 1, 2))),
        "gradient, relaxed, rate 0.1": relaxed(plain, Relaxation(rate=0.1)),
        "gradient, best, relaxed": relaxed("gradient, best", Relaxation()),
    }


def measure(lab: Any, args: argparse.Namespace, start: float) -> None:
    import trellis_store
    from trellis_run import Choice

    known = rows(lab)
    if unknown := [label for label in args.rows or () if label not in known]:
        raise SystemExit(f"--rows: no such row: {', '.join(unknown)}; there are: {list(known)}")
    stored = math.inf  # held-out KL of the stored model
    result: dict[str, Any] = {"device": lab.device_name, "model": args.name, "rows": {}}
    for label in args.rows or known:
        if time.perf_counter() - start > args.seconds:
            print(f"no time left for: {label}", flush=True)
            continue
        began = time.perf_counter()
        try:
            codes, weights = known[label]()
        except (ImportError, KeyError) as error:
            print(f"{label}: not measured ({error!r})", flush=True)
            continue
        if codes is not None:
            lab.codes[label] = codes
        took = time.perf_counter() - began
        found: dict[str, Any] = {"seconds": took}
        for text in (HELD, VALIDATION):
            measured = lab.measured(weights, text)
            found[text] = {name: values.tolist() for name, values in measured.items()}
        kl = float(np.mean(found[HELD]["kl"]))
        if args.store and TUNED in label and kl < stored:
            trellis_store.save(args.store, lab, lab.codes[label.split(TUNED)[0]], weights)
            stored, result["stored"] = kl, label
        kind = "router" if label.startswith("router") or label.endswith("router") else "gradient"
        found["proxy"] = lab.proxy(Choice(weights=kind), weights)
        result["rows"][label] = found
        texts = [
            f"{t}: KL {np.mean(found[t]['kl']):.4f}, nll {np.mean(found[t]['nll']):+.4f}"
            for t in (HELD, VALIDATION)
        ]
        proxies = ", ".join(f"{v:.5f}" for v in found["proxy"].values())
        print(
            f"[{time.perf_counter() - start:6.1f}] {label}: {'; '.join(texts)}; proxy {proxies}"
            f" ({took:.1f} s)",
            flush=True,
        )
        if args.json:
            args.json.write_text(json.dumps(result), encoding="utf-8")


def write(result: dict[str, Any], marker: str) -> None:
    """The table, with paired differences on the held-out windows to its first row."""

    def difference(found: dict, base: dict, what: str) -> str:
        values = np.array(found[HELD][what]) - np.array(base[HELD][what])
        return f"{values.mean():+.4f} ({values.std(ddof=1) / math.sqrt(len(values)):.4f})"

    measured = result["rows"]
    first = BASE if BASE in measured else next(iter(measured))
    base = measured[first]
    table = []
    for label in [first, *(label for label in measured if label != first)]:
        found = measured[label]
        held = found[HELD]
        table.append(
            [
                label,
                *(f"{value:.5f}" for value in found["proxy"].values()),
                f"{np.mean(held['nll']):+.4f}",
                f"{np.mean(held['kl']):.4f}",
                "" if found is base else difference(found, base, "kl"),
                f"{np.mean(found[VALIDATION]['nll']):+.4f}",
                f"{np.mean(found[VALIDATION]['kl']):.4f}",
            ]
        )
    header = [
        "codes", "proxy, up and gate", "proxy, down", "nll - bf16", "KL", "KL, difference",
        "validation: nll - bf16", "KL",
    ]  # fmt: skip
    windows = len(base[HELD]["kl"])
    note = (
        f"`{result['model']}`, {windows} windows of 1024 tokens of the calibration text, which no"
        " row saw; differences on the same windows with standard errors;"
        f" {result['device']}."
    )
    put_into_doc("docs/notes/ccq-2t.md", marker, f"{markdown(header, table)}\n\n{note}")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="validation text")
    parser.add_argument("--marker", default="trellis-choices", help="table of --write")
    parser.add_argument("--rows", nargs="+", metavar="LABEL")
    parser.add_argument("--store", type=Path, help="folder for the best tuned model")
    args = parsed(parser, "model", "calibration", "text")
    if args.write:
        write(json.loads(args.write.read_text(encoding="utf-8")), args.marker)
        return
    from trellis_run import TrellisLab

    from paddle_ccq.checkpoint.reader import open_checkpoint
    from paddle_ccq.evaluation.text import Tokenizer, cut_windows, token_stream
    from paddle_ccq.texts.documents import read_documents

    if args.store:
        args.store.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    source = open_checkpoint(args.model)
    args.name = source.path.name
    windows = texts(args.model, args.calibration, args.made)
    stream = token_stream(
        list(read_documents(args.text)), Tokenizer(source.path, source.config.raw)
    )
    windows[VALIDATION] = np.stack(cut_windows(np.asarray(stream, np.int64), 1024, 61_440))
    lab = TrellisLab(source, windows)
    measure(lab, args, start)


if __name__ == "__main__":
    main()
