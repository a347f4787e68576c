# SPDX-License-Identifier: Apache-2.0
"""What the server says of itself at /openapi.json: the forms of answers and of errors."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict

Reason = Literal["stop", "length"]
Responses = dict[int | str, dict[str, Any]]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Error(_Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Answer):
    error: Error


class Usage(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(_Answer):
    tokens: list[str]
    token_logprobs: list[float | None]  # null: a prompt's first token
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptToken(_Answer):
    logprob: float
    rank: int
    decoded_token: str


# For each token of the prompt, by the numbers of tokens; null for the first.
PromptLogprobs = list[dict[str, PromptToken] | None]


class CompletionChoice(_Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Reason
    prompt_logprobs: PromptLogprobs | None = None  # where the request wants them, as in vLLM


class Completion(_Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Token(_Answer):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(Token):
    top_logprobs: list[Token]


class ChatLogprobs(_Answer):
    content: list[ChatToken]


class AssistantMessage(_Answer):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Answer):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class ChatCompletion(_Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None


class Model(_Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(_Answer):
    object: Literal["list"]
    data: list[Model]


_ERRORS = {
    400: "a field is wrong, or the body is not JSON",
    401: "the key is missing or wrong",
    404: "another model or path",
    408: "the body did not come in time",
    413: "the body is too large",
    415: "the body is not sent as application/json, or it is compressed",
    429: "the queue is full; see Retry-After",
    500: "a defect",
    503: "loading or draining; see Retry-After",
}


def errors(*statuses: int) -> Responses:
    """These errors for a route's `responses`."""
    return {s: {"model": ErrorBody, "description": _ERRORS[s]} for s in statuses}


def answers(model: type[BaseModel]) -> Responses:
    """An answer, whole or streamed, and every error of a request that generates."""
    data = {"type": "string", "description": "a JSON object of the streamed kind, or [DONE]"}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    content = {"text/event-stream": {"schema": event}}
    whole: dict[str, Any] = {"model": model, "content": content}
    return {200: {**whole, "description": "the answer"}, **errors(*_ERRORS)}


def install(app: FastAPI, model_name: str) -> None:
    """Correct what FastAPI would say: the model's name is known, and wrong fields give 400."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schemas = schema["components"]["schemas"]
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for name in ("CompletionRequest", "ChatRequest"):
                schemas[name]["properties"]["model"] = {"type": "string", "enum": [model_name]}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi
