# SPDX-License-Identifier: Apache-2.0
"""The example model, quantized once for all tests of the server, and its prompts."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

from paddle_ccq.checkpoint.reader import Checkpoint, open_checkpoint
from paddle_ccq.evaluation.text import Tokenizer
from paddle_ccq.quantize import quantize
from paddle_ccq.serving.engine_model import EngineModel

EXAMPLES = Path(__file__).parent.parent / "examples"


@functools.cache
def quantized_folder() -> Path:
    scratch = Path(tempfile.mkdtemp(prefix="paddle-ccq-serve-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    quantize(EXAMPLES / "ernie-45-moe-3m", scratch / "model")
    return scratch / "model"


@functools.cache
def checkpoint() -> Checkpoint:
    return open_checkpoint(quantized_folder())


@functools.cache
def model() -> EngineModel:
    return EngineModel(checkpoint(), threads=1)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(quantized_folder(), checkpoint().config.raw)


def prompts(count: int = 5) -> list[list[int]]:
    """Token prompts of different lengths, `count` from each task of the examples."""
    found = []
    for task in ("arith", "word", "recall", "cont"):
        lines = (EXAMPLES / "data" / f"{task}.jsonl").read_text("utf-8").splitlines()
        texts = [json.loads(line)["prompt"] for line in lines[:count]]
        found += [[tokenizer().bos, *tokenizer().encode(text)] for text in texts]
    return found
