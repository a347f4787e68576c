# SPDX-License-Identifier: Apache-2.0
"""Latency, throughput and memory of the embedded server, beside the float model in Paddle.

    python benchmarks/serving.py QUANTIZED FLOAT [--write] [--llama PYTHON]

Starts the server on the quantized model and asks it over HTTP from this process, first one request
at a time, then 4, 8 and 16 at once. The float model is the same network in float32, one sequence at
a time through Paddle's matrix products, in a process of its own and without HTTP. With --llama, an
interpreter that has llama-cpp-python and gguf, llama_reference.py is one more row.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from common import ROOT, markdown, processor, put_into_doc, save_result

sys.path.insert(0, str(ROOT / "examples"))

LEVELS = (1, 4, 8, 16)
PROMPT_TOKENS, NEW_TOKENS = 64, 64
# The best run counts, of the server and of the float model alike: other work on a machine only
# ever makes one slower.
REPEATS = 3
DOC = "docs/notes/serving.md"


def tokens(seed: int) -> list[int]:
    return [5 + (seed * 7919 + 31 * i) % 4000 for i in range(PROMPT_TOKENS)]


@contextlib.contextmanager
def server(folder: str) -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-m", "paddle_ccq.serve", folder, "--port", "0"]
    command += ["--served-model-name", "model", "--max-model-len", "1024"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        for line in process.stdout:
            if found := re.search(r"at (http://\S+)/v1", line):
                yield found[1], process.pid
                break
    finally:
        process.terminate()
        process.wait()


def body(seed: int) -> dict[str, Any]:
    """Log-probabilities make the server send an event for each token, whatever its text."""
    wanted = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    return {"model": "model", "prompt": tokens(seed), **wanted}


def measure(base: str, concurrency: int) -> dict[str, float]:
    from benchmark_client import level

    requests = 2 * concurrency if concurrency > 1 else 4
    bodies, warm_up = map(body, range(requests)), map(body, range(-concurrency, 0))
    return asyncio.run(level(f"{base}/v1", [*bodies], concurrency, [*warm_up]))


def memory_mib(pid: int) -> float:
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    return 0.0


def float_model(folder: str) -> dict[str, float]:
    """Runs in its own process: batch 1 through Paddle, as evaluation generates."""
    from paddle_ccq.checkpoint.reader import open_checkpoint
    from paddle_ccq.models.ernie import Ernie
    from paddle_ccq.models.generation import generate

    empty = memory_mib(os.getpid())
    model = Ernie(open_checkpoint(folder))
    generate(model, [tokens(-1)], 4)
    firsts, rates = [], []
    for seed in range(4 * REPEATS):
        begun = time.perf_counter()
        generate(model, [tokens(seed)], 1)
        first = time.perf_counter() - begun
        begun = time.perf_counter()
        generate(model, [tokens(seed)], NEW_TOKENS)
        firsts.append(first)
        rates.append(NEW_TOKENS / (time.perf_counter() - begun))
    return {
        "tokens_per_second": max(rates),
        "first_p50_ms": 1e3 * min(firsts),
        "memory_mib": memory_mib(os.getpid()),
        "paddle_mib": empty,
    }


def in_own_process(command: list[str]) -> dict[str, Any]:
    """The JSON line that a program prints last."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure_server(folder: str) -> dict[str, Any]:
    """The best of some runs at every level, and the server's memory after loading and at last."""
    with server(folder) as (base, pid):
        loaded = memory_mib(pid)
        runs = [[measure(base, n) for n in LEVELS] for _ in range(REPEATS)]
        levels = [
            max(found, key=lambda r: r["tokens_per_second"]) for found in zip(*runs, strict=True)
        ]
        return {"levels": levels, "loaded_mib": loaded, "peak_mib": memory_mib(pid)}


def server_rows(found: dict[str, Any]) -> list[list[str]]:
    return [
        [
            f"server, {level['concurrency']} at once",
            f"{level['tokens_per_second']:.0f}",
            f"{level['first_p50_ms']:.0f} / {level['first_p99_ms']:.0f}",
            f"{level['token_p50_ms']:.1f} / {level['token_p99_ms']:.1f}",
            f"{found['peak_mib']:.0f}",
        ]
        for level in found["levels"]
    ]


def other_row(name: str, found: dict[str, Any]) -> list[str]:
    """A program that makes one sequence at a time, without HTTP."""
    rate = found["tokens_per_second"]
    return [
        f"{name}, 1 at once, no HTTP",
        f"{rate:.0f}",
        f"{found['first_p50_ms']:.0f} / -",
        f"{1e3 / rate:.1f} / -",
        f"{found['memory_mib']:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("quantized", help="checkpoint folder to serve")
    parser.add_argument("float", help="the unquantized checkpoint")
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOC}")
    parser.add_argument("--llama", metavar="PYTHON", help="interpreter with llama-cpp-python, gguf")
    parser.add_argument("--only-float", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_float:
        print(json.dumps(float_model(args.float)))
        return
    result = {"processor": processor(), "cores": len(os.sched_getaffinity(0))}
    found = measure_server(args.quantized)
    again = [sys.executable, "-W", "ignore", __file__, args.quantized, args.float, "--only-float"]
    baseline = in_own_process(again)
    rows = [*server_rows(found), other_row("float32 in Paddle", baseline)]
    llama = None
    if args.llama:
        script = str(ROOT / "benchmarks" / "llama_reference.py")
        llama = in_own_process([args.llama, script, args.float])
        name = f"llama.cpp, experts {llama['experts']}, threads {llama['threads']}"
        rows.append(other_row(name, llama))
    header = ["", "tokens/s", "first token, ms (p50/p99)", "token, ms (p50/p99)", "resident, MiB"]
    table = markdown(header, rows)
    result |= {"load_average": os.getloadavg()[0], **found, "float": baseline, "llama": llama}
    if args.write:
        put_into_doc(DOC, "serving", table)
        save_result("serving", result)
    else:
        print(table)
    print(
        f"{result['processor']}, {result['cores']} cores, load average {result['load_average']:.1f}"
    )


if __name__ == "__main__":
    main()
