# SPDX-License-Identifier: Apache-2.0
"""Memory, threads or connections that a long-running server loses request by request."""

from __future__ import annotations

import http.client
import json
import threading
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from helpers.server import process
from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.quantize import quantize
from paddle_ccq.serving.resources import resident_bytes

REQUESTS, WARM_UP, CLIENTS = 10_000, 2_000, 4
TEXT = {"model": "tiny", "prompt": "ab", "max_tokens": 1}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
# Path, body, status; what a client asks in turn. The last leaves before its answer ends.
KINDS = (
    *[("/v1/completions", {**TEXT, "prompt": f"a{i}"}, 200) for i in range(8)],
    ("/v1/completions", {**TEXT, "stream": True, "max_tokens": 3, "logprobs": 2}, 200),
    ("/v1/completions", {**TEXT, "n": 3, "seed": 5, "stop": ["x"]}, 200),
    ("/v1/chat/completions", CHAT, 200),
    ("/v1/completions", {**TEXT, "max_tokens": -1}, 400),
    ("/v1/models/other", None, 404),
    ("/metrics", None, 200),
    ("/v1/completions", {**TEXT, "stream": True, "max_tokens": 100, "ignore_eos": True}, None),
)


def ask(port: int, count: int, problems: list[str]) -> None:
    """One client's requests, over one connection as long as it lasts."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json"}
    try:
        for index in range(count):
            path, body, status = KINDS[index % len(KINDS)]
            sent = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, sent, headers)
            answer = connection.getresponse()
            if status is None:
                answer.read(10)
                connection.close()
                continue
            content = answer.read()
            if answer.status != status:
                raise AssertionError(f"{path} {sent}: {answer.status} {content!r}")
    except Exception as error:
        problems.append(repr(error))
    connection.close()


def test_memory_stays_flat_over_ten_thousand_requests(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "float", tiny_config(num_hidden_layers=2))
    quantize(tmp_path / "float", tmp_path / "packed", preset="fast", quiet=True)
    flags = ("--served-model-name", "tiny", "--kv-cache-tokens", "4096")
    with process(str(tmp_path / "packed"), *flags) as (server, base):
        status = Path(f"/proc/{server.pid}/status")
        if not status.exists():
            pytest.skip("the system does not tell a process's memory")
        port = int(base.rpartition(":")[2])

        def rounds(count: int) -> tuple[int, int]:
            problems: list[str] = []
            clients = [
                threading.Thread(target=ask, args=(port, count // CLIENTS, problems))
                for _ in range(CLIENTS)
            ]
            for client in clients:
                client.start()
            for client in clients:
                client.join(240)
            assert not problems and not any(client.is_alive() for client in clients)
            return resident_bytes(server.pid), len(list(Path(f"/proc/{server.pid}/fd").iterdir()))

        warm, files = rounds(WARM_UP)
        after, files_after = rounds(REQUESTS)
        assert after - warm < 4 << 20, f"{warm >> 10} KiB, then {after >> 10} KiB"
        assert files_after <= files + CLIENTS
        threads = next(x for x in status.read_text().splitlines() if x.startswith("Threads:"))
        assert int(threads.split()[1]) < 60
        server.kill()
        assert server.stdout.read() == ""  # clients that leave are nothing to report
