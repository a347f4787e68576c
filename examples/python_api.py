# SPDX-License-Identifier: Apache-2.0
"""The Python API step by step: quantize, look inside, multiply packed, generate without a server.

    python examples/python_api.py [--model DIR]

Needs the extra `serve`; Paddle is not used.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import numpy as np

from paddle_ccq import ops
from paddle_ccq.api import quantize, verify
from paddle_ccq.checkpoint.reader import Checkpoint, open_checkpoint
from paddle_ccq.command import run_command
from paddle_ccq.evaluation.text import Tokenizer
from paddle_ccq.models.weights import EXACT, weight_source
from paddle_ccq.serving.engine import Engine, EngineSettings, Output
from paddle_ccq.serving.engine_model import EngineModel
from paddle_ccq.serving.sampling import SamplingParams

MODEL = Path(__file__).resolve().parent / "ernie-45-moe-3m"
QUESTIONS = ["Q: 12 + 35 = ?\nA:", "Q: 90 - 41 = ?\nA:"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(MODEL), help="unquantized checkpoint")
    return run_command(parser, None, show)


def show(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "packed"
        quantize(args.model, output, quiet=True)
        checked = verify(output, reference=args.model)
        print(f"quantized and verified: {len(checked.problems)} problems")
        checkpoint = open_checkpoint(output)
        look_inside(checkpoint)
        multiply(checkpoint)
        generate(checkpoint)
    return 0


def look_inside(checkpoint: Checkpoint) -> None:
    """What is stored how, by canonical names; nothing is read but headers."""
    formats = Counter(checkpoint.format_of(name) for name in checkpoint.names())
    print(f"formats: {dict(formats)}; WINT2 rows in {checkpoint.row_order} order")


def multiply(checkpoint: Checkpoint) -> None:
    """One expert's projection straight from its packed bytes, beside its floats."""
    name = next(n for n in checkpoint.names() if checkpoint.format_of(n) == "wint2")
    packed = ops.repack("wint2", checkpoint.packed(name), checkpoint.row_order_of(name))
    weight = weight_source(checkpoint, EXACT).read(name)
    x = np.random.default_rng(0).standard_normal((4, packed.k)).astype(np.float32)
    found, expected = ops.linear(x, packed), x @ weight
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    print(f"{name}: {packed.nbytes} bytes for {weight.nbytes}, product off by {error:.1e}")


def generate(checkpoint: Checkpoint) -> None:
    """The embedded server's engine without HTTP: both questions in one batch."""
    tokenizer = Tokenizer(checkpoint.path, checkpoint.config.raw)
    engine = Engine(
        EngineModel(checkpoint, threads=1),
        tokenizer.decode,
        frozenset([tokenizer.eos]),
        EngineSettings(max_sequences=4, cache_tokens=1024),
    )
    engine.start()
    texts, done = [""] * len(QUESTIONS), threading.Semaphore(0)

    def deliver(outputs: list[Output]) -> None:
        """Called in the engine's thread, after each step."""
        for output in outputs:
            texts[output.index] += output.text
            if output.reason:
                done.release()

    prompts = [[tokenizer.bos, *tokenizer.encode(question)] for question in QUESTIONS]
    engine.submit(prompts, SamplingParams(max_tokens=16, temperature=0, stop=("\n",)), deliver)
    for _ in QUESTIONS:
        done.acquire()
    engine.stop()
    for question, text in zip(QUESTIONS, texts, strict=True):
        print(f"{question}{text}")


if __name__ == "__main__":
    sys.exit(main())
