# SPDX-License-Identifier: Apache-2.0
"""HTTP around the API: keys, methods, other origins, kinds and sizes of bodies, addresses."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import httpx

from helpers.server import (
    CHAT,
    COMPLETIONS,
    NAME,
    SMALL,
    USER,
    check_error,
    process,
    quantized_folder,
    running,
    tokenizer,
)
from paddle_ccq.addresses import http_address, local
from paddle_ccq.serve import _is_loopback, build_parser, build_service, main
from paddle_ccq.serving import answers
from paddle_ccq.serving.service import Service

KEY, PAGE = "sécret key", "http://localhost:3000"
AUTHORIZED = {"Authorization": f"Bearer {KEY}".encode()}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Service]]:
    flags = ("--api-key", KEY, "--max-body-mib", "1", "--max-queue", "4", "--max-num-seqs", "2")
    origins = ("--allow-origin", PAGE, "--allow-origin", "HTTPS://Chat.Example/")
    with running(*flags, *origins) as found:
        yield found


@pytest.fixture(scope="module")
def http(server: tuple[str, Service]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server[0], timeout=20, headers=AUTHORIZED) as client:
        yield client


def exchange(base: str, request: bytes, *more: bytes) -> bytes:
    """All that the server answers on one connection; an error if it is reset."""
    host, port = base.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(request)
        for part in more:
            connection.sendall(part)
        received = b""
        while part := connection.recv(1 << 16):
            received += part
    return received


# --- the key


@pytest.mark.parametrize("form", ["bearer {}", "BEARER {}", "Bearer  {}", "Bearer\t{}"])
def test_the_schemes_case_and_spaces_are_free(http: httpx.Client, form: str) -> None:
    headers = {"Authorization": form.format(KEY).encode()}
    assert http.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("form", ["Bearer", "{}", "Basic {}", "Bearer {}x", "Bearer x {}"])
def test_other_keys_are_refused(http: httpx.Client, form: str) -> None:
    headers = {"Authorization": form.format(KEY).encode()}
    answer = http.get("/v1/models", headers=headers)
    check_error(answer, 401)
    assert answer.headers["www-authenticate"] == "Bearer"


# --- methods and paths

GETS = ("/health", "/ping", "/metrics", "/openapi.json", "/v1/models", f"/v1/models/{NAME}")


@pytest.mark.parametrize("path", GETS)
def test_head_is_get_without_a_body(http: httpx.Client, path: str) -> None:
    got, head = http.get(path), http.head(path)
    assert head.status_code == got.status_code == 200 and head.content == b""
    assert head.headers["content-type"] == got.headers["content-type"]
    assert int(head.headers["content-length"]) > 0


def test_head_where_get_fails(http: httpx.Client, server: tuple[str, Service]) -> None:
    assert http.head("/v1/models", headers={"Authorization": "Bearer x"}).status_code == 401
    assert http.head("/v1/models/other").status_code == 404
    assert http.head("/nothing").status_code == 404
    assert http.head(COMPLETIONS).status_code == 405
    with mock.patch.object(server[1], "draining", True):
        assert http.head("/health").status_code == 503


def test_head_leaves_the_connection_in_order(server: tuple[str, Service]) -> None:
    lines = "HEAD /health HTTP/1.1\r\nHost: x\r\n\r\nGET /ping HTTP/1.1\r\nHost: x\r\n"
    received = exchange(server[0], f"{lines}Connection: close\r\n\r\n".encode())
    assert received.count(b"HTTP/1.1 200") == 2 and received.count(b'{"status":"ok"}') == 1


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        *((path, "GET, HEAD, OPTIONS") for path in GETS),
        (COMPLETIONS, "POST, OPTIONS"),
        (CHAT, "POST, OPTIONS"),
    ],
)
def test_options_and_405_name_the_methods(http: httpx.Client, path: str, allowed: str) -> None:
    answer = http.options(path, headers={"Authorization": ""})
    assert (answer.status_code, answer.headers["allow"]) == (204, allowed)
    for method in ("DELETE", "PUT"):
        wrong = http.request(method, path)
        error = check_error(wrong, 405)
        assert wrong.headers["allow"] == allowed
        assert error["message"] == f"{method} is not for this path, which takes {allowed}"
    check_error(http.options("/nothing"), 404)


@pytest.mark.parametrize("path", [*GETS[:-1], "/health//"])
def test_a_slash_at_the_end(http: httpx.Client, path: str) -> None:
    assert http.get(f"{path}/").status_code == 200
    assert http.post(f"{COMPLETIONS}/", json=SMALL).status_code == 200
    check_error(http.get("/v1/models/", headers={"Authorization": ""}), 401)


# --- pages of other origins


@pytest.mark.parametrize("origin", [PAGE, "https://chat.example"])
def test_a_preflight_comes_before_the_key(http: httpx.Client, origin: str) -> None:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os",
        "Authorization": "",
    }
    for path in (CHAT, COMPLETIONS, "/v1/models", f"{CHAT}/"):
        answer = http.options(path, headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "POST" in answer.headers["access-control-allow-methods"]
        allowed = answer.headers["access-control-allow-headers"]
        assert "authorization" in allowed and "x-stainless-os" in allowed


def test_every_answer_has_the_header(http: httpx.Client, server: tuple[str, Service]) -> None:
    page = {"Origin": PAGE}

    def check(answer: httpx.Response, status: int) -> None:
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "Origin" in answer.headers["vary"]
        assert answer.headers["access-control-expose-headers"] == "Retry-After"

    check(http.get("/v1/models", headers=page), 200)
    check(http.get("/health", headers=page), 200)
    check(http.post(COMPLETIONS, json=SMALL, headers=page), 200)
    with http.stream("POST", COMPLETIONS, json={**SMALL, "stream": True}, headers=page) as answer:
        check(answer, 200)
        assert b"[DONE]" in answer.read()
    check(http.get("/v1/models", headers={**page, "Authorization": ""}), 401)
    check(http.post(COMPLETIONS, json={}, headers=page), 400)
    check(http.get("/nothing", headers=page), 404)
    check(http.get(COMPLETIONS, headers=page), 405)
    check(http.post(COMPLETIONS, content=b"x" * (2 << 20), headers=page), 413)
    check(http.post(COMPLETIONS, content=b"{}", headers=page), 415)
    with mock.patch.object(server[1], "check_model", side_effect=RuntimeError("a defect")):
        check(http.post(COMPLETIONS, json=SMALL, headers=page), 500)
    with mock.patch.object(server[1], "draining", True):
        check(http.get("/v1/models", headers=page), 503)


def test_other_origins_get_no_header(http: httpx.Client) -> None:
    for origin in (
        "http://localhost:3001",
        "https://localhost:3000",
        "http://evil.example",
        "null",
    ):
        answer = http.get("/v1/models", headers={"Origin": origin})
        assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        refused = http.options(CHAT, headers=asked)
        assert "--allow-origin" in check_error(refused, 400)["message"]
        assert "access-control-allow-origin" not in refused.headers


def test_without_the_flag_there_is_no_cors() -> None:
    with running(load=False) as (base, _):
        asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
        for answer in (
            httpx.options(base + CHAT, headers=asked),
            httpx.get(base + "/health", headers=asked),
        ):
            assert not [name for name in answer.headers if name.startswith("access-control")]


def test_all_origins() -> None:
    with running("--allow-origin", "*", load=False) as (base, _):
        for origin in (PAGE, "null"):
            answer = httpx.get(base + "/health", headers={"Origin": origin})
            assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("text", ["localhost", "http://", "http://a/b", "http://a?x", "*.a.b"])
def test_what_is_no_origin(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(quantized_folder()), "--allow-origin", text]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --allow-origin {text}: must be *") and error.count("\n") == 1


# --- kinds of bodies


@pytest.mark.parametrize(
    "kind",
    ["application/json", "Application/JSON; charset=UTF-8", "application/json;charset=utf8",
     "application/vnd.api+json", 'application/json; charset="us-ascii"'],
)  # fmt: skip
def test_kinds_that_are_json(http: httpx.Client, kind: str) -> None:
    body = json.dumps(SMALL).encode()
    assert http.post(COMPLETIONS, content=body, headers={"Content-Type": kind}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({}, "the header Content-Type is missing; it must be application/json"),
        ({"Content-Type": ""}, "the header Content-Type is missing"),
        ({"Content-Type": "text/plain"}, "Content-Type: text/plain: it must be application/json"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "it must be application/json"),
        ({"Content-Type": "json"}, "Content-Type: json: it must be"),
        ({"Content-Type": "application/json; charset=latin-1"}, "UTF-8 only"),
        ({"Content-Type": "application/json; charset=nothing"}, "UTF-8 only"),
        ({**JSON, "Content-Encoding": "gzip"}, "Content-Encoding: gzip: bodies are taken unc"),
        ({**JSON, "Content-Encoding": "br"}, "Content-Encoding: br"),
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_other_kinds_are_named(http: httpx.Client, path: str, headers: Any, words: str) -> None:
    body = json.dumps(SMALL).encode()
    if headers.get("Content-Encoding") == "gzip":
        body = gzip.compress(body)
    assert words in check_error(http.post(path, content=body, headers=headers), 415)["message"]


def test_an_identity_encoding_is_none(http: httpx.Client) -> None:
    headers = {"Content-Encoding": "identity"}
    assert http.post(COMPLETIONS, json=SMALL, headers=headers).status_code == 200


def test_where_there_is_nothing_to_post_the_path_is_named(http: httpx.Client) -> None:
    check_error(http.post("/v1/nothing", content=b"x"), 404)
    check_error(http.post("/v1/models", content=b"x"), 405)


# --- bodies on the wire


def head(length: int | None, *lines: str) -> bytes:
    sized = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    first = [f"POST {COMPLETIONS} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}"]
    return "\r\n".join([*first, "Content-Type: application/json", sized, *lines, "", ""]).encode()


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize("length", [True, False])
def test_a_large_body_gets_its_answer_and_no_reset(
    server: tuple[str, Service], length: bool
) -> None:
    large = b" " * (24 << 20)  # more than the buffers of both sides hold
    if length:
        received = exchange(server[0], head(len(large)), large)
    else:
        received = exchange(server[0], head(None), chunked(large, 1 << 20))
    first, _, body = received.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 413") and b"connection: close" in first.lower()
    assert json.loads(body)["error"]["code"] == "body_too_large"


def test_a_large_body_with_a_wrong_key_gets_its_answer(server: tuple[str, Service]) -> None:
    large = b" " * (24 << 20)
    request = head(len(large), "Connection: close").replace(b"Bearer", b"Basic")
    assert exchange(server[0], request, large).startswith(b"HTTP/1.1 401")


def test_a_client_may_ask_before_it_sends(server: tuple[str, Service]) -> None:
    body = json.dumps(SMALL).encode()
    host, port = server[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head(len(body), "Expect: 100-continue", "Connection: close"))
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        received = b""
        while part := connection.recv(1 << 16):
            received += part
    assert received.startswith(b"HTTP/1.1 200")
    # One that would send too much is told so, and sends nothing.
    refused = exchange(server[0], head(24 << 20, "Expect: 100-continue"))
    assert refused.startswith(b"HTTP/1.1 413") and b"100 Continue" not in refused
    # Where the length is not known, it is told to continue, and then has its answer all the same.
    large = chunked(b" " * (24 << 20), 1 << 20)
    answer = exchange(server[0], head(None, "Expect: 100-continue"), large)
    assert answer.startswith(b"HTTP/1.1 100") and b"HTTP/1.1 413" in answer


def test_chunks_of_a_body(server: tuple[str, Service]) -> None:
    body = json.dumps(SMALL).encode()
    for size in (1, 7, len(body)):
        request = head(None, "Connection: close") + chunked(body, size)
        assert exchange(server[0], request).startswith(b"HTTP/1.1 200")


# --- events


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b", "a\x85b", "\x0b\x0c\x1c", "你好 🙂"])
def test_no_line_ends_inside_an_event(text: str) -> None:
    event = answers._event({"text": text})
    data, end, rest = event.partition(b"\n\n")
    assert (end, rest) == (b"\n\n", b"") and len(data.decode().splitlines()) == 1
    assert json.loads(data.removeprefix(b"data: ")) == {"text": text}


def test_readers_of_lines_get_whole_events(
    http: httpx.Client, server: tuple[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "x\u2028y\u0085z\u2029"
    monkeypatch.setattr(server[1].settings.__class__, "name", line, raising=False)
    monkeypatch.setitem(server[1].settings.__dict__, "name", line)
    asked = {**SMALL, "model": line, "stream": True}
    with http.stream("POST", COMPLETIONS, json=asked) as answer:
        lines = [text for text in answer.iter_lines() if text]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(text[6:])["model"] == line for text in lines[:-1])


# --- the begin token


def test_text_without_the_begin_token(http: httpx.Client) -> None:
    def ask(path: str, **fields: Any) -> dict[str, Any]:
        body = {"model": NAME, "max_tokens": 3, "temperature": 0, **fields}
        answer = http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    text, tokens = "Q: 1 + 1", tokenizer().encode("Q: 1 + 1")
    for given, ids in (
        ({}, [tokenizer().bos, *tokens]),
        ({"add_special_tokens": None}, [tokenizer().bos, *tokens]),
        ({"add_special_tokens": True}, [tokenizer().bos, *tokens]),
        ({"add_special_tokens": False}, tokens),
    ):
        asked = {"echo": True, "logprobs": 0}
        found = ask(COMPLETIONS, prompt=text, **asked, **given)
        same = ask(COMPLETIONS, prompt=ids, **asked)
        assert found["usage"] == same["usage"]
        assert (
            found["choices"][0]["logprobs"]["token_logprobs"]
            == (same["choices"][0]["logprobs"]["token_logprobs"])
        )
    two = ask(COMPLETIONS, prompt=[text, "ab"], add_special_tokens=False)
    assert two["usage"]["prompt_tokens"] == len(tokens) + len(tokenizer().encode("ab"))
    # The plain template has the token unless told otherwise.
    with_it = ask(CHAT, messages=USER)["usage"]["prompt_tokens"]
    assert ask(CHAT, messages=USER, add_special_tokens=True)["usage"]["prompt_tokens"] == with_it
    without = ask(CHAT, messages=USER, add_special_tokens=False)["usage"]["prompt_tokens"]
    assert without == with_it - 1
    empty = {**SMALL, "prompt": "", "add_special_tokens": False}
    check_error(http.post(COMPLETIONS, json=empty), 400, "prompt")
    wrong = {**SMALL, "add_special_tokens": "no"}
    check_error(http.post(COMPLETIONS, json=wrong), 400, "add_special_tokens")


# --- addresses


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("localhost", "http://localhost:80"),
        ("::1", "http://[::1]:80"),
        ("[::1]", "http://[::1]:80"),
        ("::", "http://[::]:80"),
        ("fe80::1%eth0", "http://[fe80::1%25eth0]:80"),
    ],
)
def test_addresses(host: str, address: str) -> None:
    assert http_address(host, 80) == address
    assert local("0.0.0.0") == "127.0.0.1" and local("[::]") == local("::") == "::1"
    assert _is_loopback("::1") and _is_loopback("[::1]") and not _is_loopback("::")


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _has_ipv6(), reason="needs IPv6")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_the_address_that_is_printed_can_be_used(host: str) -> None:
    with process(str(quantized_folder()), "--host", host) as (_, base):
        assert base.startswith("http://[::1]:")
        assert httpx.get(f"{base}/health").status_code == 200


def test_an_empty_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(quantized_folder()), "--host", ""]) == 2
    assert "--host: is empty" in capsys.readouterr().err


def test_python_may_give_one_origin_or_several() -> None:
    args = build_parser().parse_args([str(quantized_folder())])
    for given, origins in ((PAGE, (PAGE,)), ([PAGE, "*"], (PAGE, "*")), (None, ())):
        args.allow_origin = given
        assert build_service(args).settings.allow_origins == origins
