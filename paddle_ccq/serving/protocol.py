# SPDX-License-Identifier: Apache-2.0
"""Requests of the OpenAI API as this server takes them.

A field that is not known, or whose effect this server does not have, is refused by its name:
passed over, it would give a client answers it did not ask for. What asks for nothing is taken.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from .defaults import SamplingDefaults
from .neutral import Form, Neutral, only
from .sampling import SamplingParams

MAX_CHOICES = 64
MAX_LOGPROBS = 20
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions

StopString = Annotated[str, Field(min_length=1, max_length=1000)]
# An empty string by itself is what forms send when nothing was typed in.
Stop = Annotated[str, Field(max_length=1000)] | Annotated[list[StopString], Field(max_length=16)]
Token = Annotated[int, Field(ge=0)]
TokenPrompt = Annotated[list[Token], Field(min_length=1)]
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
# false does not want any; true does not say how many.
CompletionLogprobs = Annotated[
    LogprobCount | None,
    BeforeValidator(lambda value: None if value is False else value),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS},
                {"enum": [False, None]},
            ]
        }
    ),
]


class StreamOptions(Form):
    """Only with `stream`; include_usage asks for an event with the token counts at the end."""

    include_usage: bool | None = None
    include_obfuscation: only(False) = None
    continuous_usage_stats: only(False) = None


class Common(Neutral):
    """Fields of both kinds of request."""

    model: str = Field(max_length=1000)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1, description="0: the most likely token")
    top_k: int | None = Field(None, ge=-1, le=1 << 30, description="0 or -1: all tokens")
    min_p: float | None = Field(None, ge=0, le=1, description="of the most likely token's")
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=1024)] | None = None
    min_tokens: int | None = Field(None, ge=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="only equal to n")
    prompt_logprobs: LogprobCount | None = None
    ignore_eos: bool | None = None
    add_special_tokens: bool | None = Field(
        None, description="the begin token before text; by default yes, but not for a template"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Bookkeeping of the caller's, without effect on the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="after")
    def _fields_that_need_others(self) -> Common:
        options = self.stream_options
        if options is not None and options.include_usage and not self.stream:
            raise ValueError("stream_options: only with stream: true")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of: only as many as n; choices are not ranked")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs: not with stream: true")
        return self

    def wanted_logprobs(self) -> int | None:
        """How many likely tokens beside each generated one are wanted; None: no logprobs."""
        raise NotImplementedError

    def prompt_scores(self) -> int | None:
        """How many likely tokens beside each of the prompt's are wanted; None: no scores."""
        return self.prompt_logprobs

    def sampling(
        self,
        max_tokens: int,
        logprobs: int | None,
        defaults: SamplingDefaults | None = None,
    ) -> SamplingParams:
        """What the engine is asked for; `defaults` speak where the request does not."""
        chosen = (defaults or SamplingDefaults()).overridden(self)
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=max_tokens,
            seed=self.seed,
            stop=tuple(filter(None, stop)),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            min_tokens=self.min_tokens or 0,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_scores(),
            ignore_eos=bool(self.ignore_eos),
            temperature=chosen.temperature,
            top_p=chosen.top_p,
            top_k=max(0, chosen.top_k),
            min_p=chosen.min_p,
            presence_penalty=chosen.presence_penalty,
            frequency_penalty=chosen.frequency_penalty,
            repetition_penalty=chosen.repetition_penalty,
        )


class CompletionRequest(Common):
    """POST /v1/completions; a prompt is text or tokens, one or several."""

    prompt: (
        str
        | TokenPrompt
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[TokenPrompt], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    max_tokens: int | None = Field(None, ge=0, description="0: only with echo or prompt_logprobs")
    logprobs: CompletionLogprobs = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _something_is_asked_for(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise ValueError("max_tokens: must be at least 1, or come with echo: true")
        return self

    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    def prompt_scores(self) -> int | None:
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)


class TextPart(Form):
    """A part of a message's content; this server takes no other kind than text."""

    type: Literal["text"]
    text: str


class ChatMessage(Form):
    """One message; those of the assistant may have every field that an answer has."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    # As some engines return them; the chat template decides what it does with them.
    reasoning_content: str | None = None
    reasoning: str | None = None
    annotations: only([]) = None
    audio: only() = None
    function_call: only() = None
    refusal: only() = None
    tool_calls: only([]) = None

    @model_validator(mode="after")
    def _only_the_assistant_may_have_said_nothing(self) -> ChatMessage:
        if self.role != "assistant":
            if self.content is None:
                raise ValueError("messages: content is missing")
            if self.reasoning_content or self.reasoning:
                raise ValueError("messages: only the assistant has reasoning_content")
        return self

    def plain(self) -> dict[str, Any]:
        """As templates know it: text content, and no newer name for the system."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        thoughts = {"reasoning_content": self.reasoning_content, "reasoning": self.reasoning}
        return {"role": role, "content": content, **{k: v for k, v in thoughts.items() if v}}


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None
    echo: only(False) = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs: true")
        return self

    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
