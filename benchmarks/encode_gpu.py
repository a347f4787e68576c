# SPDX-License-Identifier: Apache-2.0
"""Speed of the GPU encoder, checked against the CPU core on the same weights.

    python benchmarks/encode_gpu.py [--rows 7168] [--columns 8192]

Weights are Gaussian. "kernel" is the time on the device; "whole" a call from host memory to host
memory, with copies overlapped but for ccq-2t.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from paddle_ccq import _core
from paddle_ccq.codec import trellis
from paddle_ccq.encoder import layouts, recipes
from paddle_ccq.encoder.search import pair_books
from paddle_ccq.ops import gpu, gpu_trellis

CHECKED_CHANNELS = 64
# What a search found by name, and the milliseconds of its kernels.
Found = tuple[dict[str, np.ndarray], float]


def book_search(format: str, preset: str) -> tuple[Callable[..., Found], Callable[..., dict]]:
    """The search of a format without memory: on the GPU (weight, timed), on the CPU (weight)."""
    layout, recipe = layouts.LAYOUTS[format], recipes.RECIPES[format][preset]
    books = pair_books(format, recipe)
    common = books, layout.as_dict(), recipe.as_dict()
    bits = list(layout.index_bits)
    return (
        lambda weight, timed: gpu.encode(weight, *common, timed=timed),
        lambda weight: _core.encode(weight, books, bits, *common[1:], 16, "auto"),
    )


def trellis_search(preset: str) -> tuple[Callable[..., Found], Callable[..., dict]]:
    """The same of ccq-2t; its kernels are always timed, and never overlap with copies."""
    recipe = recipes.TRELLIS_RECIPES[preset].as_dict()
    return (
        lambda weight, timed: gpu_trellis.trellis(weight, recipe),
        lambda weight: _core.trellis(weight, recipe, 16, "auto"),
    )


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
    for format in (*layouts.LAYOUTS, trellis.NAME):
        for preset in args.presets:
            trellised = format == trellis.NAME
            search, on_cpu = trellis_search(preset) if trellised else book_search(format, preset)
            kernel, whole = [], []
            for _ in range(args.repeats):
                _, milliseconds = search(weight, True)
                kernel.append(milliseconds)
                start = time.perf_counter()
                found, _ = search(weight, False)
                whole.append(time.perf_counter() - start)
            part = weight[:CHECKED_CHANNELS]
            same = all(
                np.array_equal(found[name][: len(part)], value)
                for name, value in on_cpu(part).items()
            )
            ms, s = statistics.median(kernel), statistics.median(whole)
            print(
                f"{format:<9} {preset:<8} {ms:9.1f} {weight.size / ms / 1e3:10.0f} "
                f"{weight.size / s / 1e6:10.0f} {same}",
                flush=True,
            )


if __name__ == "__main__":
    main()
