# SPDX-License-Identifier: Apache-2.0
"""Speed of the CPU ops: packed bytes a second against the memory's, and against float32 products.

    python benchmarks/cpu_ops.py [--tokens 1 4 16 64] [--threads 1] [--json FILE]
    python benchmarks/cpu_ops.py --beside-wint2      # ccq-2t at one token, for each instruction set

The matrices of one line rotate, 100 MB and more of them, so that weights come from memory (or a
shared last-level cache as large as that) and not from a core's own cache. Times are the best of
many runs: the machine may be shared. "of memory" compares with a float64 sum over 400 MB in NumPy,
"x float32" with NumPy's product of the same shape (set OPENBLAS_NUM_THREADS to --threads).
--beside-wint2 takes turns between the two formats and counts one thread's processor time, so that
other work on the machine matters little.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from paddle_ccq import _core, ops
from paddle_ccq.codec import formats

SHAPES = {"300B up_gate": (8192, 7168), "300B down": (3584, 8192), "21B up_gate": (2560, 3072)}
ROTATED_BYTES = 100_000_000
KINDS = ("wint2", "wint2-general", "ccq-2t", "ccq-2.5", "ccq-2.75")


def best(call: Callable[[], object], seconds: float = 0.6) -> float:
    """Shortest time of one call within about `seconds`."""
    call()
    shortest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


def stored(kind: str, k: int, n: int) -> tuple[str, formats.Tensors]:
    """Random packed bytes; speed does not depend on them."""
    rng = np.random.default_rng(0)
    format = kind.removesuffix("-general")
    tensors = {}
    for suffix, (shape, name) in formats.tensor_specs(format, k, n).items():
        dtype = formats.SAFETENSORS_DTYPES[name]
        if suffix == "super_scales":
            tensors[suffix] = np.full(shape, 0.01).astype(dtype)
        elif suffix == "code_scale":
            tensors[suffix] = np.full(shape, 121 if kind == format else 120.95).astype(dtype)
        elif suffix == "code_zp":
            tensors[suffix] = np.full(shape, 1251).astype(dtype)
        else:
            raw = rng.integers(0, 256, int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
            tensors[suffix] = raw.view(dtype).reshape(shape)
    return format, tensors


def dense_seconds(weight: np.ndarray, inputs: dict[int, np.ndarray]) -> dict[int, float]:
    """Time of NumPy's float32 product for every token count."""
    return {m: best(lambda x=x: x @ weight) for m, x in inputs.items()}


def beside_wint2(shapes: list[str], rounds: int = 12) -> None:
    """One token, one thread: both formats by turns, the times at the tenth percentile."""
    print(f"{'shape':<13} {'instructions':<12} {'wint2':>6} {'ccq-2t':>6} Gweights/s  ratio")
    for shape in shapes:
        k, n = SHAPES[shape]
        x = np.random.default_rng(0).standard_normal((1, k)).astype(np.float32)
        matrices = {}
        for kind in ("wint2", "ccq-2t"):
            format, tensors = stored(kind, k, n)
            first = ops.repack(format, tensors)
            count = max(1, ROTATED_BYTES // first.nbytes)
            matrices[kind] = [first, *(ops.repack(format, tensors) for _ in range(count - 1))]
        for isa in _core.matmul_instruction_sets():
            if isa == "plain":
                continue
            times: dict[str, list[float]] = {kind: [] for kind in matrices}
            for _ in range(rounds):
                for kind, several in matrices.items():
                    for weight in several:
                        start = time.thread_time()
                        ops.linear(x, weight, threads=1, isa=isa)
                        times[kind].append(time.thread_time() - start)
            rates = {kind: k * n / np.percentile(t, 10) / 1e9 for kind, t in times.items()}
            print(
                f"{shape:<13} {isa:<12} {rates['wint2']:>6.1f} {rates['ccq-2t']:>6.1f}"
                f" {rates['ccq-2t'] / rates['wint2']:>17.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--isa", default="auto", choices=["auto", *_core.matmul_instruction_sets()])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--beside-wint2", action="store_true", help="ccq-2t's rate over wint2's")
    args = parser.parse_args()
    if args.beside_wint2:
        return beside_wint2(args.shapes)
    big = np.ones(50_000_000)
    memory = big.nbytes / best(big.sum)
    del big
    print(f"memory: {memory / 1e9:.1f} GB/s read by one core; {args.threads} thread(s), {args.isa}")
    print(
        f"{'shape':<13} {'format':<14} {'M':>3} {'us':>8} {'GB/s':>6} {'of memory':>9} "
        f"{'Gweights/s':>10} {'GFLOP/s':>8} {'x float32':>9}"
    )
    rows = []
    for shape in args.shapes:
        k, n = SHAPES[shape]
        rng = np.random.default_rng(1)
        inputs = {m: rng.standard_normal((m, k), np.float32) for m in args.tokens}
        dense = dense_seconds(rng.standard_normal((k, n), np.float32), inputs)
        for kind in KINDS:
            format, tensors = stored(kind, k, n)
            first = ops.repack(format, tensors)
            count = max(1, ROTATED_BYTES // first.nbytes)
            matrices = [first, *(ops.repack(format, tensors) for _ in range(count - 1))]
            for m, x in inputs.items():
                turn = iter(range(1 << 30))

                def call(x: np.ndarray = x, matrices: list = matrices, turn=turn) -> object:
                    weight = matrices[next(turn) % len(matrices)]
                    return ops.linear(x, weight, threads=args.threads, isa=args.isa)

                seconds = best(call)
                row = {
                    "shape": shape,
                    "format": kind,
                    "tokens": m,
                    "us": seconds * 1e6,
                    "gigabytes_per_second": first.nbytes / seconds / 1e9,
                    "of_memory": first.nbytes / seconds / memory,
                    "gweights_per_second": k * n / seconds / 1e9,
                    "gflops": 2 * m * k * n / seconds / 1e9,
                    "times_float32": dense[m] / seconds,
                }
                rows.append(row)
                print(
                    f"{shape:<13} {kind:<14} {m:>3} {row['us']:>8.0f} "
                    f"{row['gigabytes_per_second']:>6.1f} {row['of_memory']:>9.0%} "
                    f"{row['gweights_per_second']:>10.1f} {row['gflops']:>8.0f} "
                    f"{row['times_float32']:>9.1f}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps({"memory": memory, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
