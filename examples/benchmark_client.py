# SPDX-License-Identifier: Apache-2.0
"""Latency and throughput of a server with the OpenAI API, at several numbers of requests at once.

    python -m paddle_ccq.serve DIR &
    python examples/benchmark_client.py [--base-url URL] [--concurrency 1 4 8 16]

Works with any such server, FastDeploy's too (`--base-url http://127.0.0.1:8180/v1`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from paddle_ccq.errors import run_cli

WORDS = (
    *("river", "stone", "light", "paper", "winter", "garden"),
    *("letter", "music", "window", "number", "summer", "story"),
)


@dataclass(frozen=True)
class Sample:
    """One request: seconds to the first text, between later ones, and tokens generated."""

    first: float
    between: list[float]
    tokens: int


async def one(client: httpx.AsyncClient, body: dict[str, Any]) -> Sample:
    """Stream one completion."""
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    first, between, tokens = 0.0, [], 0
    last = time.perf_counter()
    async with client.stream("POST", "completions", json=body) as answer:
        if answer.status_code != 200:
            await answer.aread()
            sys.exit(f"error: {answer.url}: {answer.status_code}: {answer.text[:300]}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if usage := event.get("usage"):
                tokens = usage["completion_tokens"]
            if not event.get("choices"):
                continue
            now = time.perf_counter()
            if first:
                between.append(now - last)
            else:
                first = now - last
            last = now
    return Sample(first, between, tokens)


async def level(
    base_url: str,
    bodies: Sequence[dict[str, Any]],
    concurrency: int,
    warm_up: Sequence[dict[str, Any]] = (),
    key: str = "none",
) -> dict[str, float]:
    """All bodies, so many at once, after the ones to warm up."""
    limits = httpx.Limits(max_connections=concurrency)
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(
        base_url=base_url, headers=headers, timeout=600, limits=limits
    ) as client:
        await asyncio.gather(*(one(client, body) for body in warm_up))
        gate = asyncio.Semaphore(concurrency)

        async def gated(body: dict[str, Any]) -> Sample:
            async with gate:
                return await one(client, body)

        begun = time.perf_counter()
        found = await asyncio.gather(*(gated(body) for body in bodies))
        seconds = time.perf_counter() - begun
    firsts = [sample.first for sample in found]
    between = [value for sample in found for value in sample.between] or [0.0]
    return {
        "concurrency": concurrency,
        "tokens_per_second": sum(sample.tokens for sample in found) / seconds,
        "first_p50_ms": 1e3 * statistics.median(firsts),
        "first_p99_ms": 1e3 * percentile(firsts, 0.99),
        "token_p50_ms": 1e3 * statistics.median(between),
        "token_p99_ms": 1e3 * percentile(between, 0.99),
    }


def percentile(values: Sequence[float], part: float) -> float:
    values = sorted(values)
    return values[min(len(values) - 1, int(part * len(values)))]


def prompts(words: int) -> Iterator[str]:
    """Texts of so many words, no two with a common beginning that a server might have cached."""
    number = 0
    while True:
        number += 1
        yield " ".join([str(number), *(WORDS[(number * 7 + i * i) % 12] for i in range(words - 1))])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="(the first that the server names)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 8, 16], metavar="N")
    parser.add_argument("--requests", type=int, help="at each level (default: twice the level)")
    parser.add_argument("--prompt-words", type=int, default=64, metavar="N")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N")
    args = parser.parse_args()
    key = os.environ.get("PADDLE_CCQ_API_KEY") or os.environ.get("FD_API_KEY") or "none"
    try:
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.get(f"{args.base_url}/models", headers=headers, timeout=30)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        sys.exit(f"error: {args.base_url}: {error}")
    model = args.model or answer.json()["data"][0]["id"]
    texts = prompts(args.prompt_words)
    print(f"{model}: prompts of {args.prompt_words} words, {args.max_tokens} tokens generated\n")
    print(f"{'at once':>8} {'tokens/s':>9} {'first token, ms':>20} {'token, ms':>20}")
    print(f"{'':>8} {'':>9} {'p50':>10} {'p99':>9} {'p50':>10} {'p99':>9}")
    for concurrency in args.concurrency:
        count = args.requests or max(4, 2 * concurrency)
        bodies = [
            {
                "model": model,
                "prompt": next(texts),
                "max_tokens": args.max_tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            for _ in range(count + concurrency)
        ]
        rest, warm_up = bodies[:count], bodies[count:]
        found = asyncio.run(level(args.base_url, rest, concurrency, warm_up, key))
        print(
            f"{concurrency:>8} {found['tokens_per_second']:>9.1f} {found['first_p50_ms']:>10.1f}"
            f" {found['first_p99_ms']:>9.1f} {found['token_p50_ms']:>10.2f}"
            f" {found['token_p99_ms']:>9.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
