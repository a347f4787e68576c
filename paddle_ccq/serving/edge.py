# SPDX-License-Identifier: Apache-2.0
"""What holds for a request whatever its path: HEAD and OPTIONS, a slash at the end, other origins.

Pages of other origins ask from a browser (CORS). That layer is the outermost one, so that a
preflight, which has no key, is answered before the key is looked at, and errors have its headers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

METHODS = ("GET", "HEAD", "POST", "OPTIONS")


class Api(FastAPI):
    """FastAPI inside the layers of this module."""

    def __init__(self, origins: Sequence[str], **settings: Any) -> None:
        # The interactive pages would load scripts from elsewhere. A redirect would lose the key
        # or the body with some clients; a slash at the end is passed over instead.
        super().__init__(docs_url=None, redoc_url=None, redirect_slashes=False, **settings)
        self.origins = tuple(origins)

    def build_middleware_stack(self) -> ASGIApp:
        """Starlette's stack inside Methods, and that inside Origins where pages may use the API."""
        stack = Methods(super().build_middleware_stack(), self)
        return Origins(stack, self.origins) if self.origins else stack

    def methods_of(self, scope: Scope) -> list[str]:
        """The methods that a path takes; none where there is no such path."""
        found: set[str] = set()
        for route in self.router.routes:
            if route.matches({**scope, "method": "GET"})[0] is not Match.NONE:
                found |= set(getattr(route, "methods", None) or ())
        if "GET" in found:
            found.add("HEAD")
        return [method for method in METHODS if method in found or (found and method == "OPTIONS")]

    def takes(self, scope: Scope) -> bool:
        """Whether the request's path takes its method."""
        return scope["method"] in self.methods_of(scope)


class Methods:
    """ASGI middleware: HEAD as GET without a body, OPTIONS, and one slash too many."""

    def __init__(self, app: ASGIApp, api: Api) -> None:
        self.app, self.api = app, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Routes see GET for HEAD and no slash at the end; OPTIONS of a known path ends here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        if len(path) > 1 and path.endswith("/"):
            raw = scope.get("raw_path") or path.encode()
            scope = {**scope, "path": path.rstrip("/") or "/", "raw_path": raw.rstrip(b"/") or b"/"}
        if scope["method"] == "OPTIONS" and (allowed := self.api.methods_of(scope)):
            await Response(status_code=204, headers={"Allow": ", ".join(allowed)})(
                scope, receive, send
            )
            return
        if scope["method"] == "HEAD":
            scope, send = {**scope, "method": "GET"}, _without_body(send)
        await self.app(scope, receive, send)


def _without_body(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return wrapped


class Origins(CORSMiddleware):
    """Starlette's CORS with this API's form of errors."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=("*",),
            expose_headers=("Retry-After",),
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """A refusal as JSON with code "cors", where Starlette's is plain text."""
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        reason = bytes(answer.body).decode("utf-8", "replace")
        error = ApiError(answer.status_code, f"{reason}; see --allow-origin", code="cors")
        kept = {
            name: value for name, value in answer.headers.items() if not name.startswith("content-")
        }
        return JSONResponse(error.body(), answer.status_code, kept)
