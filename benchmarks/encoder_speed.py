# SPDX-License-Identifier: Apache-2.0
"""Weights per second of the compiled encoder: a table of docs/notes/encoder.md.

python benchmarks/encoder_speed.py [--write]
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from common import markdown, processor, put_into_doc, save_result

from paddle_ccq import _core
from paddle_ccq.encoder.search import SearchEncoder
from paddle_ccq.host import default_threads

# Routed-expert weights of ERNIE-4.5-300B-A47B: 51 layers x 64 experts x 3 x 8192 x 3584.
WEIGHTS_300B = 51 * 64 * 3 * 8192 * 3584
K = 8192
ROUNDS = 3


def rate(encoder: SearchEncoder, weight: np.ndarray) -> float:
    """Weights per second, median of some rounds."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        encoder.encode(weight)
        seconds.append(time.perf_counter() - start)
    return weight.size / statistics.median(seconds)


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--write", action="store_true", help="put the table into docs/notes/encoder.md"
    )
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((768, K)).astype(np.float32)
    threads = default_threads()
    isas = _core.instruction_sets()
    rows, results = [], []
    for format in ("wint2", "ccq-2.5", "ccq-2.75"):
        for preset in ("fast", "default", "best"):
            # The slower builds only where they say something: WINT2.
            names = isas if format == "wint2" else isas[:1]
            part = weight if preset != "best" else weight[:128]
            speeds = {
                isa: rate(SearchEncoder(format, preset, threads, isa), _part(part, isa))
                for isa in names
            }
            one = rate(SearchEncoder(format, preset, 1), part[: len(part) // 2])
            best = speeds[isas[0]]
            results.append(
                {
                    "format": format,
                    "preset": preset,
                    "threads": threads,
                    "speeds": speeds,
                    "one": one,
                }
            )
            rows.append(
                [
                    f"{format}, {preset}",
                    f"{best / 1e6:.1f}",
                    f"{one / 1e6:.1f}",
                    *(f"{speeds[i] / 1e6:.1f}" if i in speeds else "" for i in isas[1:]),
                    duration(WEIGHTS_300B / best),
                ]
            )
            print(rows[-1], flush=True)
    header = ["format, preset", f"{isas[0]}, {threads} threads", "1 thread", *isas[1:]]
    text = markdown([*header, "300B's experts"], rows)
    note = (
        f"\n\nMillion weights per second on {threads} cores of an {processor()}, Gaussian "
        f"weights, K = {K}, median of {ROUNDS}; the last column is {WEIGHTS_300B / 1e9:.0f} "
        "billion weights at the first column's rate. `python benchmarks/encoder_speed.py`."
    )
    if not args.write:
        print(text + note)
        return
    save_result("encoder_speed", {"processor": processor(), "rows": results})
    put_into_doc("docs/notes/encoder.md", "encoder speed", text + note)


def _part(weight: np.ndarray, isa: str) -> np.ndarray:
    """Less work for the build without vector instructions."""
    return weight[:64] if isa == "plain" else weight


if __name__ == "__main__":
    main()
