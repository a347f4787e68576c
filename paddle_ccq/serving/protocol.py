# SPDX-License-Identifier: Apache-2.0
"""Requests of the OpenAI API as this server takes them.

A field that is not known, or whose effect this server does not have, is refused by its name:
passed over, it would give a client answers it did not ask for.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .sampling import SamplingParams

MAX_CHOICES = 64
MAX_LOGPROBS = 20
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions

StopString = Annotated[str, Field(min_length=1, max_length=1000)]
Stop = StopString | Annotated[list[StopString], Field(max_length=16)]
Token = Annotated[int, Field(ge=0)]
TokenPrompt = Annotated[list[Token], Field(min_length=1)]


# Strict: "logprobs": false must not become 0, which asks for them.
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(BaseModel):
    model_config = STRICT
    include_usage: bool = False


class Common(BaseModel):
    """Fields of both kinds of request."""

    model_config = STRICT

    model: str = Field(max_length=1000)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 30, description="0 or -1: all tokens")
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Bookkeeping of the caller's, without effect on the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @model_validator(mode="after")
    def _usage_only_in_streams(self) -> Common:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream: true")
        return self

    def sampling(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            seed=self.seed,
            stop=tuple(stop),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logprobs=logprobs,
            ignore_eos=self.ignore_eos,
        )


class CompletionRequest(Common):
    """POST /v1/completions; a prompt is text or tokens, one or several."""

    prompt: (
        str
        | TokenPrompt
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[TokenPrompt], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None

    def wanted_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(BaseModel):
    model_config = STRICT
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = STRICT
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, Any]:
        """As templates know it: text content, and no newer name for the system."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content}


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs: true")
        return self

    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
