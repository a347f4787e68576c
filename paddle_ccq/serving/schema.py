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
    """What is wrong, in OpenAI's form; `param` names the field of the request to change."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Answer):
    """The body of an answer whose status is 400 or more."""

    error: Error


class Usage(_Answer):
    """Tokens of all prompts of the request, and of all choices of the answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(_Answer):
    """Lists of one length: an entry for each token, with echo for the prompt's tokens first.

    Log-probabilities are natural ones, before temperature and penalties; those of a prompt's first
    token are null. Offsets count characters of the choice's text.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptToken(_Answer):
    """A token at a place of the prompt, with its natural log-probability and its rank there.

    Rank 1 is the likeliest token.
    """

    logprob: float
    rank: int
    decoded_token: str


# For each token of the prompt, by the numbers of tokens; null for the first.
PromptLogprobs = list[dict[str, PromptToken] | None]


class CompletionChoice(_Answer):
    """One answer to one prompt; answer i of n to prompt p has the index p * n + i.

    finish_reason is length if the number of tokens ended it, else stop.
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Reason
    prompt_logprobs: PromptLogprobs | None = None  # where the request wants them, as in vLLM


class Completion(_Answer):
    """The answer to POST /v1/completions; `created` is in seconds since 1970."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Token(_Answer):
    """A token with its natural log-probability before temperature and penalties.

    `bytes` may be a part of a character, for which `token` then has U+FFFD.
    """

    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(Token):
    """A generated token, and the likeliest ones at its place, as many as top_logprobs asks for."""

    top_logprobs: list[Token]


class ChatLogprobs(_Answer):
    """The generated tokens in their order."""

    content: list[ChatToken]


class AssistantMessage(_Answer):
    """The model's answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Answer):
    """One of the n answers; finish_reason is length if the number of tokens ended it, else stop."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class ChatCompletion(_Answer):
    """The answer to POST /v1/chat/completions; `created` is in seconds since 1970."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None


class Model(_Answer):
    """The name for `model` in requests; max_model_len counts tokens of prompt and answer."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(_Answer):
    """The one model that is served."""

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
