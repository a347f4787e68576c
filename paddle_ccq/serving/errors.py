# SPDX-License-Identifier: Apache-2.0
"""Errors in OpenAI's JSON form, with the status that OpenAI's clients act on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
# Fields of several types, whose validation lists a complaint for each of them.
UNIONS = {
    "prompt": "must be a string, a list of strings, a list of tokens or a list of such lists",
    "stop": "must be a string or a list of at most 16 strings, none of them empty",
}
MAX_MESSAGE = 500  # characters; parts of it come from the request
# What a client should wait before it tries again; a queue of short answers moves in that time.
RETRY_AFTER = {"Retry-After": "1"}


class ApiError(Exception):
    """One answer with an error; `param` names the field of the request that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's error object; message and param are cut after MAX_MESSAGE characters."""
        # A name from the request may hold half a surrogate pair, which no answer could carry.
        message = self.message[:MAX_MESSAGE].encode("utf-8", "replace").decode()
        param = self.param and self.param[:MAX_MESSAGE].encode("utf-8", "replace").decode()
        kind = "server_error" if self.status >= 500 else TYPES.get(self.status)
        return {
            "error": {
                "message": message,
                "type": kind or "invalid_request_error",
                "param": param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The answer with this error's status and headers."""
        return JSONResponse(self.body(), self.status, self.headers)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """A 400 that names the field; FastAPI's own form would be a 422 with a list."""
    error = errors[0]
    if error["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON", code="invalid_json")
    path = [str(part) for part in error["loc"] if part != "body"]
    # Our own validators speak of several fields at once and name the one to change first.
    message = str(error["msg"]).removeprefix("Value error, ")
    if not path and error["type"] == "value_error":
        path = [message.split(":")[0]]
        return ApiError(400, message, path[0], "invalid_value")
    field = path[0] if path else None
    code = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
    if error["type"] == "extra_forbidden":
        message = "not known to this server"
    where = ".".join(path) or "the body"
    if field in UNIONS and error["type"] != "missing":
        where, message = field, UNIONS[field]
    return ApiError(400, f"{where}: {message}", field, code.get(error["type"], "invalid_value"))


def install(app: FastAPI) -> None:
    """Let every error of the app take the one form."""

    @app.exception_handler(ApiError)
    async def _api(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _validation(_: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        headers = dict(error.headers or {})
        if error.status_code == 404:
            message = f"no such path: {request.url.path}"
        if error.status_code == 405:
            headers["Allow"] = ", ".join(request.app.methods_of(request.scope))
            message = f"{request.method} is not for this path, which takes {headers['Allow']}"
        answer = ApiError(error.status_code, message, headers=headers)
        return answer.response()

    @app.exception_handler(Exception)
    async def _unexpected(_: Request, __: Exception) -> JSONResponse:
        message = "an unexpected error; the server's log has its details"
        # uvicorn closes the connection after it; a client that is not told would use it again.
        return ApiError(500, message, headers={"Connection": "close"}).response()
