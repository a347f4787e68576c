# SPDX-License-Identifier: Apache-2.0
"""Quantize the example model, verify it, measure it before and after, and serve it: two minutes.

    python examples/quickstart.py [--output DIR]

The same calls work on any ERNIE-4.5 checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai

from paddle_ccq.command import run_command
from paddle_ccq.errors import CcqError
from paddle_ccq.evaluate import evaluate
from paddle_ccq.evaluation.report import detail_table
from paddle_ccq.quantize import print_summary, quantize
from paddle_ccq.reporting import console
from paddle_ccq.verify import print_result, verify

HERE = Path(__file__).resolve().parent
MODEL = HERE / "ernie-45-moe-3m"
TEXT = HERE / "data" / "public-domain-sample.txt"
QUESTION = "Q: 12 + 35 = ?\nA:"
TASKS = [HERE / "data" / f"{name}.jsonl" for name in ("arith", "word", "recall", "defmc", "cont")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="keep the quantized model in this new folder")
    return run_command(parser, None, keep_or_not)


def keep_or_not(args: argparse.Namespace) -> int:
    if args.output is None:
        scratch = Path(tempfile.mkdtemp(prefix="paddle-ccq-"))
        try:
            return run(scratch / "model")
        finally:
            shutil.rmtree(scratch)
    return run(Path(args.output))


def run(output: Path) -> int:
    print(f"1. Quantize {MODEL.name}: experts to wint2, other linear layers to wint8\n")
    result = quantize(MODEL, output)
    print_summary(result)

    print("\n2. Verify structure, hashes, code ranges, and the error of every matrix\n")
    checked = verify(output, reference=MODEL)
    print_result(checked)
    if checked.problems:
        raise CcqError(f"{output}: did not verify")

    print("\n3. Evaluate before and after: perplexity, KL divergence, tasks\n")
    measured = evaluate(output, reference=MODEL, text=TEXT, tasks=TASKS)
    scores = measured["results"]
    named = {"before, bf16": scores["reference"], "after, wint2": scores["model"]}
    console().print(detail_table(named))
    print(f"Tasks are in parts of 1, 200 items each; the text is examples/data/{TEXT.name}.")
    print("So small a model pays far more than a larger one: docs/notes/accuracy.md measures one.")

    print("\n4. Serve it behind the OpenAI API and ask one question\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "paddle_ccq.serve", str(output), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            ask(f"http://127.0.0.1:{port}", server)
        finally:
            server.terminate()
    return 0


def ask(url: str, server: subprocess.Popen) -> None:
    """One completion through the openai client, once the server says that it is ready."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health"):
                break
        except (urllib.error.URLError, ConnectionError):
            if server.poll() is not None or time.monotonic() > deadline:
                raise CcqError(
                    "the server did not start; run `python -m paddle_ccq.serve`"
                ) from None
            time.sleep(0.2)
    # Paddle turns on logging for everybody; the client would report each request.
    logging.disable(logging.INFO)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    answer = client.completions.create(
        model=model, prompt=QUESTION, max_tokens=16, temperature=0, stop="\n"
    )
    print(f"{QUESTION}{answer.choices[0].text}")
    print(f"({answer.usage.completion_tokens} tokens from {model}, server stopped again)")


if __name__ == "__main__":
    sys.exit(main())
