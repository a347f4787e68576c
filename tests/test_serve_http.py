# SPDX-License-Identifier: Apache-2.0
"""What arrives over HTTP that no client would send: malformed, too large, too many, not allowed."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.server import CHAT, COMPLETIONS, NAME, SMALL, USER, check_error, running, tokenizer
from paddle_ccq.serving.protocol import CompletionRequest
from paddle_ccq.serving.service import Service


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Service]]:
    flags = ("--max-num-seqs", "2", "--max-queue", "4", "--max-body-mib", "1")
    with running(*flags) as found:
        yield found


@pytest.fixture(scope="module")
def http(server: tuple[str, Service]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server[0], timeout=20) as client:
        yield client


@pytest.mark.parametrize(
    "field,value",
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "warm"),
        ("top_p", -0.1),
        ("top_p", 1.5),
        ("top_k", -2),
        ("max_tokens", 0),
        ("max_tokens", 1 << 70),
        ("max_tokens", 2048),
        ("n", 0),
        ("n", 65),
        ("seed", 1 << 63),
        ("stop", ["x", ""]),
        ("stop_token_ids", [8192]),
        ("stop_token_ids", "2"),
        ("min_tokens", 2),
        ("min_tokens", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("prompt_logprobs", 21),
        ("stop", ["x"] * 17),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("logprobs", 21),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", {"a": 1}),
        ("prompt", [1, "a"]),
        ("prompt", [8192]),
        ("prompt", [-1]),
        ("prompt", [5] * 2048),
        ("prompt", None),
        ("echo", "yes"),
        ("logprobs", True),
        ("suffix", "x"),
        ("logit_bias", {"5": 1}),
        ("best_of", 2),
        ("stream_options", {"include_usage": True}),
        ("no_such_field", 1),
    ],
)
def test_a_wrong_field_is_named(http: httpx.Client, field: str, value: Any) -> None:
    error = check_error(http.post(COMPLETIONS, json={**SMALL, field: value}), 400, field)
    assert error["message"].startswith(field)


@pytest.mark.parametrize(
    "field,value",
    [
        ("messages", []),
        ("messages", [{"role": "robot", "content": "x"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
        ("messages", [{"role": "user", "content": "word " * 3000}]),
        ("top_logprobs", 3),
        ("max_completion_tokens", 5000),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("echo", True),
        ("response_format", {"type": "json_object"}),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(http: httpx.Client, field: str, value: Any) -> None:
    check_error(http.post(CHAT, json={"model": NAME, "messages": USER, field: value}), 400, field)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_request_at_all(http: httpx.Client, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    check_error(http.post(COMPLETIONS, content=body, headers=headers), 400)


def test_half_a_surrogate_pair(http: httpx.Client) -> None:
    def post(path: str, **fields: Any) -> httpx.Response:
        body = json.dumps({"model": NAME, **fields}).encode()  # escapes it
        return http.post(path, content=body, headers={"content-type": "application/json"})

    check_error(post(COMPLETIONS, prompt="a\ud800b"), 400, "prompt")
    check_error(post(CHAT, messages=[{"role": "user", "content": "\udfff"}]), 400, "messages")
    assert post(COMPLETIONS, **{"prompt": "a", "\ud800": 1}).status_code == 400
    assert post(COMPLETIONS, prompt="a", model="\ud800").status_code in (400, 404)


def test_not_a_number_is_no_temperature(http: httpx.Client) -> None:
    body = json.dumps({**SMALL, "temperature": float("nan")}).encode()
    headers = {"content-type": "application/json"}
    check_error(http.post(COMPLETIONS, content=body, headers=headers), 400, "temperature")


def test_wrong_paths_methods_and_models(http: httpx.Client) -> None:
    check_error(http.get("/v1/nothing"), 404)
    check_error(http.get("/v1/models/../../etc/passwd"), 404)
    check_error(http.get("/v1/models/%2e%2e%2fconfig.json"), 404, "model")
    check_error(http.get(COMPLETIONS), 405)
    check_error(http.post(COMPLETIONS, json={**SMALL, "model": "/etc/passwd"}), 404, "model")


def test_a_body_is_bounded_with_and_without_a_length(http: httpx.Client) -> None:
    large = b'{"prompt": "' + b"a" * (1 << 20) + b'"}'
    check_error(http.post(COMPLETIONS, content=large), 413)
    parts = (large[i : i + 65536] for i in range(0, len(large), 65536))
    check_error(http.post(COMPLETIONS, content=parts), 413)
    assert http.post(COMPLETIONS, json=SMALL).status_code == 200


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(
        st.sampled_from([*CompletionRequest.model_fields, "unknown"]),
        st.recursive(
            st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
            max_leaves=4,
        ),
    )
)
def test_no_body_gives_a_server_error(http: httpx.Client, fields: dict[str, Any]) -> None:
    body = json.dumps({**SMALL, **fields}).encode()
    answer = http.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    if isinstance(fields.get("model"), str) and answer.status_code == 404:
        check_error(answer, 404, "model")  # another model's name, as documented
        return
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        check_error(answer, 400, answer.json()["error"]["param"])


def test_a_full_queue_says_when_to_come_back(server: tuple[str, Service]) -> None:
    base, service = server
    long = {**SMALL, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=base, timeout=20) as client, contextlib.ExitStack() as stack:
        for n in (4, 2):
            stream = stack.enter_context(client.stream("POST", COMPLETIONS, json={**long, "n": n}))
            assert stream.status_code == 200
            until(lambda: service.engine.counts()[0] == 2)
        answer = client.post(COMPLETIONS, json=SMALL)
        check_error(answer, 429)
        assert int(answer.headers["retry-after"]) >= 1
        check_error(client.post(COMPLETIONS, json={**SMALL, "n": 60}), 429)
        assert client.get("/health").status_code == 200
        gauges = client.get("/metrics").text
        assert "fastdeploy:num_requests_running 2.0\n" in gauges
        assert "fastdeploy:num_requests_waiting 4.0\n" in gauges
    assert service.engine.wait_until_idle(10)


def test_a_failure_before_the_first_output_ends_the_generation(
    server: tuple[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> None:
        raise RuntimeError("no text of the prompt")

    monkeypatch.setattr("paddle_ccq.serving.answers.echoes", broken)
    base, service = server
    cancelled = service.metrics.cancelled._value.get
    asked = {**SMALL, "echo": True, "max_tokens": 1900, "ignore_eos": True}
    before = cancelled()
    check_error(httpx.post(base + COMPLETIONS, json=asked, timeout=20), 500)
    assert cancelled() == before + 1
    assert service.engine.wait_until_idle(10)


@pytest.mark.parametrize("broken_part", ["echoes", "CompletionAnswer.piece"])
def test_a_stream_that_fails_ends_with_an_error(
    server: tuple[str, Service], monkeypatch: pytest.MonkeyPatch, broken_part: str
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no text")

    monkeypatch.setattr(f"paddle_ccq.serving.answers.{broken_part}", broken)
    base, service = server
    asked = {**SMALL, "echo": True, "max_tokens": 1900, "ignore_eos": True, "stream": True}
    answer = httpx.post(base + COMPLETIONS, json=asked, timeout=20)
    assert answer.status_code == 200
    *_, last = answer.text.strip().split("\n\n")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert "failed on this request" in error["message"] and "DONE" not in answer.text
    assert service.engine.wait_until_idle(10)


def counters(http: httpx.Client) -> dict[str, float]:
    """All counts and gauges by name with labels; no buckets, sums and times of creation."""
    lines = http.get("/metrics").text.splitlines()
    pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    left_out = ("_bucket", "_created", "_sum")
    return {n: float(v) for n, _, v in pairs if not n.partition("{")[0].endswith(left_out)}


def grown(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    more = {name: value - before.get(name, 0) for name, value in after.items()}
    return {name: value for name, value in more.items() if value}


def test_metrics_have_fastdeploys_names_and_count(http: httpx.Client) -> None:
    before = counters(http)
    chosen = {"max_tokens": 3, "n": 2, "ignore_eos": True}
    assert http.post(COMPLETIONS, json={**SMALL, **chosen}).status_code == 200
    assert http.post(COMPLETIONS, json={**SMALL, "n": 0}).status_code == 400
    after = counters(http)
    prompt = 2 * (1 + len(tokenizer().encode("a")))
    assert grown(before, after) == {
        "fastdeploy:requests_number_total": 1,
        "fastdeploy:prompt_tokens_total": prompt,
        "fastdeploy:generation_tokens_total": 6,
        "fastdeploy:request_success_total": 2,
        "fastdeploy:time_to_first_token_seconds_count": 2,
        "fastdeploy:time_per_output_token_seconds_count": 4,
        "fastdeploy:e2e_request_latency_seconds_count": 2,
        'paddle_ccq:sequences_finished_total{finished_reason="length"}': 2,
        'paddle_ccq:requests_refused_total{status="400"}': 1,
    }
    gauges = ("num_requests_running", "num_requests_waiting", "gpu_cache_usage_perc")
    assert all(after[f"fastdeploy:{name}"] == 0 for name in gauges)


def test_a_request_that_only_reads_its_prompt_counts_no_generated_token(http: httpx.Client) -> None:
    before = counters(http)
    asked = {**SMALL, "max_tokens": 0, "echo": True}
    assert http.post(COMPLETIONS, json=asked).json()["usage"]["completion_tokens"] == 0
    assert grown(before, counters(http)) == {
        "fastdeploy:requests_number_total": 1,
        "fastdeploy:prompt_tokens_total": 1 + len(tokenizer().encode("a")),
        "fastdeploy:request_success_total": 1,
        "fastdeploy:e2e_request_latency_seconds_count": 1,
        'paddle_ccq:sequences_finished_total{finished_reason="length"}': 1,
    }


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_slow_reader_holds_nobody_up_and_loses_nothing(server: tuple[str, Service]) -> None:
    base, service = server
    host, port = base.removeprefix("http://").split(":")
    # 900 events of some 700 bytes: far more than the reader's buffer holds.
    wanted = {"max_tokens": 900, "ignore_eos": True, "stream": True, "logprobs": 20, "seed": 1}
    body = json.dumps({**SMALL, **wanted})
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        slow.settimeout(10)
        slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        received = slow.recv(100)  # and for now no more
        answer = httpx.post(base + COMPLETIONS, json=SMALL)
        assert answer.status_code == 200
        # The engine does not wait for the reader: its slot and cache are free again.
        assert service.engine.wait_until_idle(20) and service.engine.cache.used == 0
        while not received.endswith(b"0\r\n\r\n"):
            part = slow.recv(1 << 16)
            assert part
            received += part
    assert len(received) > 300_000
    assert received.count(b"data: {") == 900 and b"data: [DONE]" in received


def test_the_key_is_wanted_where_there_is_one() -> None:
    with running("--api-key", "sécret", load=False) as (base, service):
        get = httpx.Client(base_url=base).get
        for wrong in (None, "Bearer", "Bearer secret", "Basic c8OpY3JldA==", "Bearer sécret2"):
            headers = {} if wrong is None else {"Authorization": wrong.encode()}
            check_error(get("/v1/models", headers=headers), 401)
        right = {"Authorization": "Bearer sécret".encode()}
        answer = get("/v1/models", headers=right)
        check_error(answer, 503)  # the key comes first, then what the server does
        assert answer.headers["retry-after"]
        check_error(get("/health"), 503)
        service.load()
        assert get("/v1/models", headers=right).status_code == 200
        assert get("/health").status_code == get("/ping").status_code == 200
        assert get("/metrics").status_code == 200
        service.drain()
        check_error(get("/v1/models", headers=right), 503)
