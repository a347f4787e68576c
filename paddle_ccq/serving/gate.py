# SPDX-License-Identifier: Apache-2.0
"""What a request must pass before any route sees it: key, state of the server, size."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .service import Service, unavailable

# Time for a whole body, so that a client that sends a byte a minute does not stay.
BODY_SECONDS = 30


class Gate:
    """ASGI middleware for everything under /v1; health and metrics are open."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            if self.service.state != "ready":
                raise unavailable(self.service.state)
            body = await self._body(scope, receive)
        except ApiError as error:
            self.service.metrics.refused.labels(error.status).inc()
            await error.response()(scope, receive, send)
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
        sent = _header(scope, b"authorization")
        # Compared as a whole and in constant time: the time must not tell how much was right.
        if not hmac.compare_digest(sent, b"Bearer " + key.encode()):
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


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")
