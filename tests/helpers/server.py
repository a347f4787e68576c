# SPDX-License-Identifier: Apache-2.0
"""The example model, quantized once for all tests of the server, and its prompts."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paddle_ccq.checkpoint.reader import Checkpoint, open_checkpoint
from paddle_ccq.evaluation.text import Tokenizer
from paddle_ccq.quantize import quantize
from paddle_ccq.serve import build_parser, build_service
from paddle_ccq.serving.engine_model import EngineModel, Piece
from paddle_ccq.serving.sampling import TokenLogprob, token_logprob

if TYPE_CHECKING:
    import httpx

    from paddle_ccq.serving.service import Service

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


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


def reference(tokens: list[int], top: int) -> list[TokenLogprob]:
    """Scores of the tokens from the second, from one step for every beginning."""
    cache = model().new_cache(len(tokens))
    region = cache.allocate(len(tokens))
    found = []
    for place, token in enumerate(tokens[:-1]):
        [logits] = model().forward([Piece([token], place, region)], cache)
        found.append(token_logprob(logits, tokens[place + 1], top))
    return found


def rolling_windows(tokens: list[int], longest: int) -> list[tuple[list[int], list[int]]]:
    """Contexts and what is scored after them, as lm-eval cuts a text: every token is scored once.

    After the first window, each context is the token before, or more where the rest is short.
    """
    rest = tokens[longest:]
    windows = [([tokenizer().bos], tokens[:longest])]
    for begin in range(0, len(rest), longest):
        scored = rest[begin : begin + longest]
        end = longest + begin + len(scored)
        windows.append((tokens[end - longest - 1 : end - len(scored)], scored))
    return windows


NAME = "example"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
SMALL = {"model": NAME, "prompt": "a", "max_tokens": 1}


@contextlib.contextmanager
def running(*flags: str, load: bool = True) -> Iterator[tuple[str, Service]]:
    """A server in this process with `serve`'s flags: its base address and its service."""
    import uvicorn

    from paddle_ccq.serving.app import create_app

    arguments = [str(quantized_folder()), "--served-model-name", NAME, *flags]
    service = build_service(build_parser().parse_args(arguments))
    config = uvicorn.Config(
        create_app(service), port=0, log_level="error", ws="none", lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    if load:
        service.load()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", service
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        if service.engine is not None:
            service.engine.stop()


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`python -m paddle_ccq.serve` and its address, once it prints that."""
    command = [sys.executable, "-m", "paddle_ccq.serve", "--port", "0", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    server.said = ""
    try:
        for line in server.stdout:
            server.said += line
            if found := re.search(r"at (http://\S+)/v1", line):
                yield server, found[1]
                break
        else:
            raise AssertionError(server.said)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def check_error(answer: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    """The answer's error object, after a look at its form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"] and "\n" not in error["message"]
    return error
