# SPDX-License-Identifier: Apache-2.0
"""The GPU encoders of ccq-2t at expert shapes: rates, wint2's beside, hours of a whole model.

    python benchmarks/trellis_gpu.py --json trellis_gpu.json   # on the GPU; a few minutes
    python benchmarks/trellis_gpu.py --write trellis_gpu.json  # tables of docs/notes/ccq-2t.md

Weights are Gaussian, Hessians those of neighbours that go together (AR 0.9): statistics decide how
many sequences survive, and with them the time. "kernels" is the time on the device, "call" a whole
encode() with the host's part of it. Channels at both ends are compared with the CPU core.
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
from ldlq_work import device

from paddle_ccq import _core
from paddle_ccq.codec import trellis
from paddle_ccq.encoder import ldlq
from paddle_ccq.encoder.factory import calibrated_encoder, make_encoder
from paddle_ccq.encoder.ldlq_metric import InputHessian, make_metric
from paddle_ccq.encoder.recipes import TRELLIS_RECIPES
from paddle_ccq.encoder.trellis_ldlq import TRELLIS_LDLQ_RECIPES
from paddle_ccq.encoder.trellis_metric import make_trellis_metric
from paddle_ccq.host import default_threads
from paddle_ccq.ops import gpu_ldlq, gpu_trellis, gpu_trellis_ldlq

PRESETS = ("fast", "default", "best")
# Output channels and inputs; the second is down_proj of ERNIE-4.5-300B.
SHAPES = ((7168, 2048), (8192, 3584))
CHECKED = 8  # channels at each end
# 54 MoE layers of 64 experts of 3 x 8192 x 3584.
ERNIE_300B = 54 * 64 * 3 * 8192 * 3584


def gaussian(n: int, k: int) -> np.ndarray:
    return np.random.default_rng(k).standard_normal((n, k), np.float32)


def autoregressive(k: int) -> np.ndarray:
    return 0.9 ** np.abs(np.subtract.outer(np.arange(k), np.arange(k)))


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], at: np.ndarray) -> bool:
    return all(found[name][at].tobytes() == value.tobytes() for name, value in expected.items())


def ends(n: int) -> np.ndarray:
    return np.r_[:CHECKED, n - CHECKED : n]


def best_of(call: Callable[[], Any], repeats: int = 2) -> tuple[float, Any]:
    """Least seconds, and what the last call returned."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def without_data(n: int, k: int, preset: str) -> dict[str, Any]:
    weight = gaussian(n, k)
    recipe = TRELLIS_RECIPES[preset].as_dict()
    _, (found, milliseconds) = best_of(lambda: gpu_trellis.trellis(weight, recipe))
    at = ends(n)
    expected = _core.trellis(np.ascontiguousarray(weight[at]), recipe, default_threads(), "auto")
    calls = {}
    for format in (trellis.NAME, "wint2"):
        encoder = make_encoder(format, preset, device="gpu")
        calls[format], _ = best_of(lambda encoder=encoder: encoder.encode(weight))
    return {
        "kernels": weight.size / milliseconds * 1e3,
        "call": weight.size / calls[trellis.NAME],
        "wint2_call": weight.size / calls["wint2"],
        "same": same(found, expected, at),
    }


def with_data(n: int, k: int, preset: str, metric: dict[str, np.ndarray]) -> dict[str, Any]:
    weight = gaussian(n, k)
    recipe = TRELLIS_LDLQ_RECIPES[preset]
    prepared = ldlq.prepare(weight, recipe)
    rest = recipe.as_dict()
    seconds, (found, milliseconds) = best_of(
        lambda: gpu_trellis_ldlq.trellis_ldlq(prepared.weight, metric, prepared.supers, rest)
    )
    at = ends(n)
    expected = _core.trellis_ldlq(
        *(np.ascontiguousarray(prepared.weight[at]), metric),
        *(np.ascontiguousarray(prepared.supers[:, at]), rest, default_threads(), "auto"),
    )
    energy = float(((prepared.weight @ metric["h"]) * prepared.weight).sum())
    return {
        "kernels": weight.size / milliseconds * 1e3,
        "search": weight.size / seconds,
        "loss": float(found["loss"].sum()) / energy,
        "same": same(found, expected, at),
    }


def wint2_with_data(n: int, k: int, preset: str, metric: dict[str, np.ndarray]) -> float:
    """Weights a second of its kernels."""
    recipe = ldlq.LDLQ_RECIPES[preset]
    prepared = ldlq.prepare(gaussian(n, k), recipe)
    rest = metric, ldlq.books(recipe.code_pairs), prepared.supers, recipe.as_dict()
    _, (_, parts) = best_of(lambda: gpu_ldlq.ldlq(prepared.weight, *rest))
    milliseconds = sum(parts[part] for part in ("pairs", "feedback", "descent"))
    return n * k / milliseconds * 1e3


def host_part(n: int, k: int) -> dict[str, float]:
    """Seconds of one encode() with statistics (preset fast), and of what the GPU has no part in."""
    known = InputHessian(autoregressive(k), 1)
    uncalibrated = make_encoder(trellis.NAME, "fast")
    encoder = calibrated_encoder("fast", default_threads(), lambda _: known, uncalibrated, "gpu")
    weight = gaussian(n, k)
    start = time.perf_counter()
    metric = encoder.metric_of(known.matrix)
    factors = time.perf_counter() - start
    start = time.perf_counter()
    encoder.search(weight, metric)
    search = time.perf_counter() - start
    start = time.perf_counter()
    encoder.encode(weight)
    whole = time.perf_counter() - start
    return {"factors": factors, "search": search, "whole": whole}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    def say(what: str, n: int, k: int, preset: str, row: dict[str, Any]) -> None:
        rates = ", ".join(
            f"{name} {value / 1e6:.1f} M/s" if value > 100 else f"{name} {value:.5f}"
            for name, value in row.items()
        )
        print(f"{what} {n} x {k} {preset}: {rates}", flush=True)

    rows = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        if args.json:  # a run that is cut short leaves what it has
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    result = {
        "device": asdict(device()),
        "processor": processor(),
        "threads": default_threads(),
        "checked": 2 * CHECKED,
        "rows": rows,
    }
    # Starts the device, and allocates.
    make_encoder(trellis.NAME, "fast", device="gpu").encode(gaussian(64, 128))
    for n, k in args.shapes:
        for preset in args.presets:
            if "data-free" in args.parts:
                row = without_data(n, k, preset)
                say("data-free", n, k, preset, row)
                keep({"kind": "data-free", "n": n, "k": k, "preset": preset, **row})
        if "calibrated" not in args.parts:
            continue
        h = autoregressive(k)
        metric = make_trellis_metric(h, 0.01).as_dict()
        wint2_metric = make_metric(h, 0.01).as_dict()
        for preset in args.presets:
            row = with_data(n, k, preset, metric)
            row["wint2_kernels"] = wint2_with_data(n, k, preset, wint2_metric)
            say("calibrated", n, k, preset, row)
            keep({"kind": "calibrated", "n": n, "k": k, "preset": preset, **row})
        host = host_part(n, k)
        print(f"host {n} x {k}: {host}", flush=True)
        keep({"kind": "host", "n": n, "k": k, **host})
    result["held_bytes"] = {
        "data-free": gpu_trellis.held_bytes(),
        "calibrated": gpu_trellis_ldlq.held_bytes(),
    }
    return result


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result with all rows; of two rows of the same kind, shape and preset the later one."""
    devices = {result["device"]["name"] for result in results}
    if len(devices) != 1:
        raise SystemExit(f"error: results of different devices: {', '.join(sorted(devices))}")
    rows = {
        (row["kind"], row["n"], row["k"], row.get("preset")): row
        for result in results
        for row in result["rows"]
    }
    held = [result["held_bytes"] for result in results if "held_bytes" in result]
    most = {kind: max(h[kind] for h in held) for kind in held[0]} if held else {}
    return results[-1] | {"rows": list(rows.values()), "held_bytes": most}


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Marker -> text."""
    rows = result["rows"]
    note = f"{result['device']['name']}, host {result['processor']}, {result['threads']} threads."
    found = [r for r in rows if r["kind"] == "data-free"]
    free = markdown(
        ["shape, preset", "kernels", "`encode()`", "`wint2`, `encode()`", "hours of ERNIE-300B"],
        [
            [
                f"{r['n']} x {r['k']}, {r['preset']}",
                f"{r['kernels'] / 1e6:.0f}",
                f"{r['call'] / 1e6:.0f}",
                f"{r['wint2_call'] / 1e6:.0f}",
                f"{ERNIE_300B / r['call'] / 3600:.1f}",
            ]
            for r in found
        ],
    )
    calibrated = [r for r in rows if r["kind"] == "calibrated"]
    data = markdown(
        ["shape, preset", "kernels", "with copies", "`wint2`, kernels", "hours of ERNIE-300B"],
        [
            [
                f"{r['n']} x {r['k']}, {r['preset']}",
                f"{r['kernels'] / 1e6:.1f}",
                f"{r['search'] / 1e6:.1f}",
                f"{r['wint2_kernels'] / 1e6:.1f}",
                f"{ERNIE_300B / r['search'] / 3600:.1f}",
            ]
            for r in calibrated
        ],
    )
    checked = all(r["same"] for r in found + calibrated)
    note += (
        f" Million weights a second; hours: of the 304 thousand million weights of its experts at"
        f" the rate of the column before `wint2`'s. {result['checked']} channels of every row were"
        f" compared with the CPU core: {'the same bytes' if checked else 'OTHER BYTES'}."
    )
    return {"gpu-free": f"{free}\n\n{note}", "gpu-calibrated": data}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--parts", nargs="+", default=["data-free", "calibrated"])
    parser.add_argument(
        "--shapes", nargs="+", default=SHAPES, type=lambda s: tuple(map(int, s.split("x")))
    )
    parser.add_argument("--json", metavar="OUT", help="keep the result")
    parser.add_argument(
        "--write",
        nargs="+",
        metavar="FILE",
        help="put kept results into the docs, later ones over earlier; no GPU",
    )
    args = parser.parse_args()
    if args.write:
        result = merged([json.loads(Path(p).read_text(encoding="utf-8")) for p in args.write])
        save_result("trellis_gpu_h200", result)
        for marker, text in tables(result).items():
            put_into_doc("docs/notes/ccq-2t.md", marker, text)
        return
    result = measure(args)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not all(row.get("same", True) for row in result["rows"]):
        raise SystemExit("error: bytes differ from the CPU's")


if __name__ == "__main__":
    main()
