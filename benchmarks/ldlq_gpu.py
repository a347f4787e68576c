# SPDX-License-Identifier: Apache-2.0
"""The calibrated search on a GPU at the expert shapes of ERNIE-4.5: time, arithmetic, projection.

    python benchmarks/ldlq_gpu.py --json ldlq_gpu.json      # on the GPU; about a minute
    python benchmarks/ldlq_gpu.py --write ldlq_gpu.json     # a table of docs/notes/calibration.md

Weights are Gaussian and Hessians those of made-up inputs; neither matters for the time. Whole
matrices are searched, one of each shape and preset; a model's time is theirs times the matrices
that its default plan makes wint2. What the host does for a matrix is measured beside it. Channels
at both ends and in the middle are compared with the CPU core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from common import markdown, processor, put_into_doc, save_result
from ldlq_work import MODELS, PARTS, SHAPES, TERM, Device, Shape, device, predicted, work

from paddle_ccq import _core
from paddle_ccq.encoder import ldlq
from paddle_ccq.encoder.factory import make_encoder
from paddle_ccq.encoder.ldlq import LDLQ_RECIPES, Prepared
from paddle_ccq.encoder.ldlq_metric import InputHessian, LdlqMetric
from paddle_ccq.encoder.search_gpu import GpuLdlqEncoder
from paddle_ccq.host import default_threads
from paddle_ccq.ops import gpu_ldlq

PRESETS = ("fast", "default", "best")
CHECKED = 16  # channels at each of three places


class Timed(GpuLdlqEncoder):
    """The product's encoder; keeps what went into the search and what it took."""

    def _find(self, prepared: Prepared, metric: LdlqMetric) -> dict[str, np.ndarray]:
        self.arguments = prepared, metric
        start = time.perf_counter()
        try:
            return super()._find(prepared, metric)
        finally:
            self.seconds = time.perf_counter() - start


def made_up_hessian(k: int, rng: np.random.Generator) -> np.ndarray:
    """Of inputs with many small directions and some large ones."""
    tokens = min(2 * k, 4096)
    x = rng.standard_normal((tokens, k), np.float32)
    x += rng.standard_normal((tokens, 32), np.float32) @ rng.standard_normal((32, k), np.float32)
    return (x.T @ x).astype(np.float64) / tokens


def measure(shape: Shape, presets: list[str], rate: float, say: Callable) -> dict[str, Any]:
    """Times of one matrix: whole on the host once, the search with every preset."""
    rng = np.random.default_rng(shape.k)
    weight = rng.standard_normal((shape.n, shape.k), np.float32)
    hessian = made_up_hessian(shape.k, rng)
    threads = default_threads()
    factor_seconds = []

    def timed_metric(*arguments: Any) -> LdlqMetric | None:
        start = time.perf_counter()
        metric = make_metric(*arguments)
        factor_seconds.append(time.perf_counter() - start)
        return metric

    make_metric, ldlq.make_metric = ldlq.make_metric, timed_metric
    uncalibrated = make_encoder("wint2", "fast", threads=threads)
    known = InputHessian(hessian, 1)
    encoder = Timed("fast", threads, lambda name: known, uncalibrated)
    start = time.perf_counter()
    encoder.encode(weight)
    whole = time.perf_counter() - start
    ldlq.make_metric = make_metric
    host = {"factors": factor_seconds[0], "rest": whole - factor_seconds[0] - encoder.seconds}
    what = f"{shape.model} {shape.name} [{shape.n}, {shape.k}]"
    say(f"{what}: host factors {host['factors']:.1f} s, rest of encode() {host['rest']:.1f} s")

    metric = encoder.arguments[1].as_dict()
    runs = {}
    for preset in presets:
        recipe = LDLQ_RECIPES[preset]
        prepared = ldlq.prepare(weight, recipe)
        books = ldlq.books(recipe.code_pairs)
        rest = metric, books, prepared.supers, recipe.as_dict()
        start = time.perf_counter()
        found, parts = gpu_ldlq.ldlq(prepared.weight, *rest)
        wall = time.perf_counter() - start
        device_ms = sum(parts[part] for part in PARTS)
        terms = sum(terms for terms, _, _ in work(shape.k, recipe).values())
        macs = weight.size * terms / (device_ms / 1e3)
        first = (0, max(0, shape.n // 2 - CHECKED // 2), shape.n - CHECKED)
        at = np.unique(np.concatenate([np.arange(start, start + CHECKED) for start in first]))
        start = time.perf_counter()
        cpu = _core.ldlq(
            np.ascontiguousarray(prepared.weight[at]),
            *(metric, books, np.ascontiguousarray(prepared.supers[:, at]), recipe.as_dict()),
            *(threads, "auto"),
        )
        cpu_seconds = time.perf_counter() - start
        runs[preset] = {
            "wall_ms": 1e3 * wall,
            "parts_ms": parts,
            "predicted_ms": predicted(shape, recipe, rate),
            "terms_a_weight": terms,
            "terms_a_second": macs,
            "share_of_peak": macs * TERM / rate,
            "same_as_cpu": all(found[name][at].tobytes() == cpu[name].tobytes() for name in cpu),
            "cpu_weights_a_second": len(at) * shape.k / cpu_seconds,
        }
        say(line(preset, runs[preset]))
    return {**asdict(shape), "host_seconds": host, "presets": runs}


def line(preset: str, run: dict[str, Any]) -> str:
    """One measurement, predictions in brackets."""
    parts, guess = run["parts_ms"], run["predicted_ms"]
    split = ", ".join(f"{part} {parts[part]:.0f} ({guess[part]:.0f})" for part in parts)
    return (
        f"  {preset:<8} {split} ms; call {run['wall_ms']:.0f} ms;"
        f" {run['terms_a_second'] / 1e12:.1f}e12 terms/s, {run['share_of_peak']:.0%} of the peak;"
        f" same bytes: {run['same_as_cpu']}"
    )


def projection(result: dict[str, Any]) -> list[list[str]]:
    """Model and preset -> hours on one GPU, and of the host."""
    rows = []
    for model in MODELS:
        kinds = [m for m in result["matrices"] if m["model"] == model]
        if not kinds:
            continue
        host = {
            part: sum(m["count"] * m["host_seconds"][part] for m in kinds)
            for part in ("factors", "rest")
        }
        for preset in kinds[0]["presets"]:
            search = sum(m["count"] * m["presets"][preset]["wall_ms"] for m in kinds) / 1e3
            expected = sum(
                m["count"] * sum(m["presets"][preset]["predicted_ms"].values()) for m in kinds
            )
            rows.append(
                [
                    f"{model}, {preset}",
                    f"{sum(m['count'] for m in kinds):,}",
                    hours(expected / 1e3),
                    hours(search),
                    hours(host["factors"]),
                    hours(host["rest"]),
                ]
            )
    return rows


def hours(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


PROJECTION = [
    "model, preset",
    "matrices",
    "search, predicted",
    "search",
    "host: factors",
    "host: the rest",
]


def table(result: dict[str, Any]) -> str:
    """Both tables and what they are of."""
    rows = []
    for m in result["matrices"]:
        for preset, r in m["presets"].items():
            parts, guess = r["parts_ms"], r["predicted_ms"]
            rows.append(
                [
                    f"{m['model'][10:]} {m['name']} [{m['n']}, {m['k']}], {preset}",
                    f"{r['terms_a_weight']:,.0f}",
                    *(f"{parts[part]:.0f} ({guess[part]:.0f})" for part in PARTS),
                    f"{r['wall_ms']:.0f}",
                    f"{r['terms_a_second'] / 1e12:.1f}",
                    f"{r['share_of_peak']:.0%}",
                ]
            )
    header = ["matrix, preset", "terms a weight", *(f"{part} ms" for part in PARTS), "call ms"]
    header += ["10^12 terms/s", "of peak"]
    gpu, same = (
        result["device"],
        all(r["same_as_cpu"] for m in result["matrices"] for r in m["presets"].values()),
    )
    note = (
        f"{gpu['name']}, {gpu['processors']} multiprocessors at most {gpu['clock'] / 1e6:.0f} MHz;"
        f" host {result['processor']}, {result['threads']} threads. In brackets what was predicted"
        " before the first run. *call*: from host memory to host memory. Device memory held at the"
        f" end: {result['held_bytes'] / 1e9:.1f} GB. {result['checked']} channels of every matrix"
        f" and preset compared with the CPU core: {'the same bytes' if same else 'DIFFERENT'}."
    )
    return f"{markdown(header, rows)}\n\n{markdown(PROJECTION, projection(result))}\n\n{note}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--json", metavar="OUT", help="keep the result")
    parser.add_argument("--write", metavar="FILE", help="put a kept result into the docs; no GPU")
    parser.add_argument(
        "--smoke",
        type=int,
        metavar="N",
        help="only see that it runs: shapes divided by N, an H100's figures taken for granted",
    )
    args = parser.parse_args()
    if args.write:
        result = json.loads(Path(args.write).read_text(encoding="utf-8"))
        if result["device"]["name"] == "none":
            parser.error(f"--write {args.write}: of a --smoke run, not of a GPU")
        save_result("ldlq_gpu_h100", result)
        put_into_doc("docs/notes/calibration.md", "ldlq-gpu", table(result))
        return
    start = time.perf_counter()
    gpu = Device("none", 132, 1.98e9) if args.smoke else device()
    todo = list(SHAPES)
    if args.smoke:
        step = args.smoke
        todo = [
            Shape(s.model, s.name, s.n // step, max(128, s.k // step // 128 * 128), s.count)
            for s in todo
        ]
    small = np.random.default_rng(0).standard_normal((16, 128), np.float32)
    known = InputHessian(np.eye(128), 1)
    # Starts the device, and page-locks the buffers.
    Timed("fast", 1, lambda name: known, make_encoder("wint2", threads=1)).search(
        small, ldlq.make_metric(known.matrix, 0.01)
    )
    matrices = [
        measure(s, tuple(args.presets), gpu.rate, lambda t: print(t, flush=True)) for s in todo
    ]
    result = {
        "device": asdict(gpu),
        "processor": processor(),
        "threads": default_threads(),
        "checked": 3 * CHECKED,
        "matrices": matrices,
        "held_bytes": gpu_ldlq.held_bytes(),
        "seconds": time.perf_counter() - start,
    }
    print(markdown(PROJECTION, projection(result)))
    print(
        f"device memory held: {result['held_bytes'] / 1e9:.2f} GB; took {result['seconds']:.0f} s"
    )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not all(r["same_as_cpu"] for m in matrices for r in m["presets"].values()):
        raise SystemExit("error: bytes differ from the CPU's")


if __name__ == "__main__":
    main()
