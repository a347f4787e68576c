# SPDX-License-Identifier: Apache-2.0
"""The examples run as their readers would run them, and say what they promise."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from helpers.server import EXAMPLES, NAME, ROOT, running


def run(*command: str, **environment: str) -> str:
    """The output of a command that must succeed."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with running() as (base, _):
        yield f"{base}/v1"


def test_python_api() -> None:
    said = run(sys.executable, str(EXAMPLES / "python_api.py"))
    assert "quantized and verified: 0 problems" in said
    assert "'wint2': 64" in said and "off by" in said
    assert said.count("Q: ") == said.count("\nA:") == 2


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_quantize_and_serve() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = run("sh", str(EXAMPLES / "quantize_and_serve.sh"), "", str(port))
    assert '"object":"text_completion"' in said and "data: [DONE]" in said
    assert "fastdeploy:generation_tokens_total" in said
    with socket.socket() as again:  # the server is gone
        again.bind(("127.0.0.1", port))


def test_client(base_url: str) -> None:
    said = run(
        sys.executable, str(EXAMPLES / "client_openai.py"), "--base-url", base_url,
        "--max-tokens", "8",
    )  # fmt: skip
    assert f"{NAME}: Q: 585 - 17" in said and "tokens streamed" in said
    assert said.count(" -> ") == 8


def test_benchmark_client(base_url: str) -> None:
    said = run(
        sys.executable, str(EXAMPLES / "benchmark_client.py"), "--base-url", base_url,
        "--concurrency", "1", "3", "--max-tokens", "5", "--prompt-words", "8",
    )  # fmt: skip
    rows = [line.split() for line in said.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["1", "3"]
    # The time of a token can round to nothing; its rate and the first token's time cannot.
    assert all(float(value) >= 0 for row in rows for value in row)
    assert all(float(value) > 0 for row in rows for value in row[:4])


def test_benchmark_client_without_a_server() -> None:
    command = [sys.executable, str(EXAMPLES / "benchmark_client.py")]
    done = subprocess.run(
        [*command, "--base-url", "http://127.0.0.1:9/v1"], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
