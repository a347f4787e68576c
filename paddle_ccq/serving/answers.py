# SPDX-License-Identifier: Apache-2.0
"""Answers in the OpenAI API's two shapes, whole and as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from typing import Any

from .engine import Output
from .errors import ApiError
from .sampling import TokenLogprob
from .service import Generation

Dict = dict[str, Any]


class Answer(ABC):
    """One request's answer; the subclasses know the shape of a choice."""

    whole_object = chunk_object = id_prefix = ""

    def __init__(
        self, model: str, prompt_tokens: int, choices: int, token_text: Callable[[int], str]
    ) -> None:
        self.token_text = token_text
        self.prompt_tokens = prompt_tokens
        self.tokens = [0] * choices
        self.head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    @abstractmethod
    def choice(self, index: int, outputs: list[Output]) -> Dict:
        """One choice of a whole answer."""

    @abstractmethod
    def piece(self, output: Output) -> Dict:
        """One choice of a streamed event."""

    def opening(self) -> list[Dict]:
        """Choices of a first event, before there is any text."""
        return []

    def usage(self) -> Dict:
        generated = sum(self.tokens)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
        }

    async def whole(self, generation: Generation) -> Dict:
        found: list[list[Output]] = [[] for _ in self.tokens]
        async with generation:
            async for outputs in generation:
                for output in outputs:
                    found[output.index].append(output)
                    self.tokens[output.index] = output.tokens
                    if output.reason == "error":
                        raise failed()
        if not generation.complete:
            raise ApiError(499, "the client closed the request")
        choices = [self.choice(index, outputs) for index, outputs in enumerate(found)]
        return {**self.head, "object": self.whole_object, "choices": choices, "usage": self.usage()}

    async def events(self, generation: Generation, with_usage: bool) -> AsyncIterator[bytes]:
        head = {**self.head, "object": self.chunk_object}
        if with_usage:
            head["usage"] = None
        async with generation:
            for choice in self.opening():
                yield _event({**head, "choices": [choice]})
            async for outputs in generation:
                lines = b""
                for output in outputs:
                    self.tokens[output.index] = output.tokens
                    if output.reason == "error":
                        yield lines + _event(failed().body())
                        return
                    if output.text or output.reason or output.logprob:
                        lines += _event({**head, "choices": [self.piece(output)]})
                if lines:
                    yield lines
        if not generation.complete:
            return
        if with_usage:
            yield _event({**head, "choices": [], "usage": self.usage()})
        yield b"data: [DONE]\n\n"


class CompletionAnswer(Answer):
    whole_object = chunk_object = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.offsets = [0] * len(self.tokens)

    def choice(self, index: int, outputs: list[Output]) -> Dict:
        pieces = [self.piece(output) for output in outputs]
        logprobs = None
        if pieces[0]["logprobs"] is not None:
            keys = pieces[0]["logprobs"]
            logprobs = {key: [p["logprobs"][key][0] for p in pieces] for key in keys}
        text = "".join(output.text for output in outputs)
        reason = outputs[-1].reason
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def piece(self, output: Output) -> Dict:
        logprobs = None
        if output.logprob is not None:
            found = output.logprob
            logprobs = {
                "tokens": [self.token_text(found.token)],
                "token_logprobs": [found.logprob],
                "top_logprobs": [{self.token_text(t): value for t, value in found.top}],
                "text_offset": [self.offsets[output.index]],
            }
        self.offsets[output.index] += len(output.text)
        return {
            "index": output.index,
            "text": output.text,
            "logprobs": logprobs,
            "finish_reason": output.reason,
        }


class ChatAnswer(Answer):
    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def opening(self) -> list[Dict]:
        return [
            _chat_piece(index, {"role": "assistant", "content": ""}, None, None)
            for index in range(len(self.tokens))
        ]

    def choice(self, index: int, outputs: list[Output]) -> Dict:
        logprobs = None
        if outputs[0].logprob is not None:
            logprobs = {"content": [self._logprob(output.logprob) for output in outputs]}
        text = "".join(output.text for output in outputs)
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": outputs[-1].reason,
        }

    def piece(self, output: Output) -> Dict:
        logprobs = None
        if output.logprob is not None:
            logprobs = {"content": [self._logprob(output.logprob)]}
        delta = {"content": output.text} if output.text else {}
        return _chat_piece(output.index, delta, logprobs, output.reason)

    def _logprob(self, found: TokenLogprob) -> Dict:
        entry = self._token(found.token, found.logprob)
        entry["top_logprobs"] = [self._token(token, value) for token, value in found.top]
        return entry

    def _token(self, token: int, logprob: float) -> Dict:
        text = self.token_text(token)
        # Part of a character has no text of its own, so its bytes are not known here.
        raw = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": raw}


def _chat_piece(index: int, delta: Dict, logprobs: Dict | None, reason: str | None) -> Dict:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _event(content: Dict) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def failed() -> ApiError:
    return ApiError(500, "the model failed on this request; the server's log has its details")
