# SPDX-License-Identifier: Apache-2.0
"""Speed of the GPU encoder, checked against the CPU core on the same weights.

    python benchmarks/encode_gpu.py [--rows 7168] [--columns 8192]

Weights are Gaussian. "kernel" is the time on the device; "whole" a call from host memory to host
memory, copies overlapped.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from paddle_ccq import _core
from paddle_ccq.encoder import layouts, recipes
from paddle_ccq.encoder.search import pair_books
from paddle_ccq.ops import gpu

CHECKED_CHANNELS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=7168, help="output channels")
    parser.add_argument("--columns", type=int, default=8192, help="inputs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--presets", nargs="+", default=["fast", "default", "best"])
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((args.rows, args.columns), np.float32)
    print(
        f"{'format':<9} {'preset':<8} {'kernel ms':>9} {'Mweights/s':>10} {'whole Mw/s':>10} same"
    )
    for format, layout in layouts.LAYOUTS.items():
        for preset in args.presets:
            recipe = recipes.RECIPES[format][preset]
            books = pair_books(format, recipe)
            common = books, layout.as_dict(), recipe.as_dict()
            kernel, whole = [], []
            for _ in range(args.repeats):
                _, milliseconds = gpu.encode(weight, *common, timed=True)
                kernel.append(milliseconds)
                start = time.perf_counter()
                found, _ = gpu.encode(weight, *common)
                whole.append(time.perf_counter() - start)
            part = weight[:CHECKED_CHANNELS]
            bits = list(layout.index_bits)
            cpu = _core.encode(part, books, bits, common[1], common[2], 16, "auto")
            same = all(
                np.array_equal(found[name][: len(part)], value) for name, value in cpu.items()
            )
            ms, s = statistics.median(kernel), statistics.median(whole)
            print(
                f"{format:<9} {preset:<8} {ms:9.1f} {weight.size / ms / 1e3:10.0f} "
                f"{weight.size / s / 1e6:10.0f} {same}",
                flush=True,
            )


if __name__ == "__main__":
    main()
