# SPDX-License-Identifier: Apache-2.0
"""What a request must pass before any route sees it: key, state of the server, size, kind."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import hmac
from collections.abc import Callable
from email.message import Message as Headers
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .service import Service, unavailable

# Time for a whole body, so that a client that sends a byte a minute does not stay.
BODY_SECONDS = 30
# What is still read of the body of a refused request. Closed before the client has sent it, the
# connection would be reset, and many clients would report that instead of the answer.
DRAIN_BYTES, DRAIN_SECONDS = 64 << 20, 10


class Gate:
    """ASGI middleware for everything under /v1; health and metrics are open."""

    def __init__(self, app: ASGIApp, service: Service, takes: Callable[[Scope], bool]) -> None:
        self.app, self.service, self.takes = app, service, takes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its whole body, or answer it with 401, 408, 413, 415 or 503."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        begun = read_whole = False

        async def watched() -> Message:
            nonlocal begun, read_whole
            begun = True  # a client that waited is told to continue now
            message = await receive()
            read_whole = not message.get("more_body", False)
            return message

        try:
            self._check_key(scope)
            if self.service.state != "ready":
                raise unavailable(self.service.state)
            body = await self._body(scope, watched)
            if scope["method"] == "POST" and self.takes(scope):
                check_kind(scope)
        except ApiError as error:
            self.service.metrics.refused.labels(error.status).inc()
            if read_whole or error.status == 408 or (_waits(scope) and not begun):
                await error.response()(scope, receive, send)
            else:
                await _answer_and_drain(error, watched, send)
            return
        except ClientLeftError:
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, self._counting(send))

    def _check_key(self, scope: Scope) -> None:
        key = self.service.settings.api_key
        if key is None:
            return
        scheme, sent, *_ = [*_header(scope, b"authorization").split(None, 1), b"", b""]
        # The scheme's case is free (RFC 9110). The key is compared as a whole and in constant
        # time: the time must not tell how much was right.
        right = hmac.compare_digest(sent.strip(), key.strip().encode())
        if scheme.lower() != b"bearer" or not right:
            raise ApiError(
                401,
                "a valid API key is needed: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self.service.settings.max_body_bytes
        too_large = ApiError(
            413,
            f"the body is larger than {limit} bytes",
            code="body_too_large",
            headers={"Connection": "close"},
        )
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length) > limit:
            raise too_large

        async def read() -> bytes:
            body = bytearray()
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeftError
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)

        try:
            return await asyncio.wait_for(read(), BODY_SECONDS)
        except asyncio.TimeoutError:
            message = f"the body did not come within {BODY_SECONDS} s"
            raise ApiError(408, message, headers={"Connection": "close"}) from None

    def _counting(self, send: Send) -> Send:
        async def wrapped(message: Any) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self.service.metrics.refused.labels(message["status"]).inc()
            await send(message)

        return wrapped


class ClientLeftError(Exception):
    """Nobody is there to answer."""


def _waits(scope: Scope) -> bool:
    """Whether the client has sent nothing yet, and will not, if it is not told to continue."""
    return _header(scope, b"expect").lower() == b"100-continue"


async def _answer_and_drain(error: ApiError, receive: Receive, send: Send) -> None:
    """Answer at once, but end the answer only when the body has come, or enough of it."""
    answer = error.response()
    start = {"type": "http.response.start", "status": error.status, "headers": answer.raw_headers}
    await send(start)
    await send({"type": "http.response.body", "body": bytes(answer.body), "more_body": True})

    async def drain() -> None:
        left = DRAIN_BYTES
        while left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            if not message.get("more_body", False):
                return

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(drain(), DRAIN_SECONDS)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def check_kind(scope: Scope) -> None:
    """Refuse a body that is not plain JSON, and name the header that says so."""
    encoding = _header(scope, b"content-encoding").decode("latin-1").strip()
    if encoding.lower() not in ("", "identity"):
        raise _unsupported(f"Content-Encoding: {encoding}: bodies are taken uncompressed only")
    given = _header(scope, b"content-type").decode("latin-1").strip()
    if not given:
        raise _unsupported("the header Content-Type is missing; it must be application/json")
    headers = Headers()
    headers["Content-Type"] = given
    kind, charset = headers.get_content_type(), headers.get_content_charset() or "utf-8"
    main, _, sub = kind.partition("/")
    if main != "application" or not (sub == "json" or sub.endswith("+json")):
        raise _unsupported(f"Content-Type: {given}: it must be application/json")
    try:
        name = codecs.lookup(charset).name
    except (LookupError, ValueError):
        name = charset
    if name not in ("utf-8", "ascii"):
        raise _unsupported(f"Content-Type: {given}: JSON is taken in UTF-8 only")


def _unsupported(message: str) -> ApiError:
    return ApiError(415, message, code="unsupported_media_type")


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")
