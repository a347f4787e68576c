# SPDX-License-Identifier: Apache-2.0
"""Answers in the OpenAI API's two shapes, whole and as server-sent events."""

from __future__ import annotations

import json
import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any

from .echo import Echo, echoes
from .engine import Output
from .errors import ApiError
from .protocol import Common
from .sampling import TokenLogprob
from .service import Generation, Service

log = logging.getLogger(__name__)

Dict = dict[str, Any]


class Answer(ABC):
    """One request's answer; the subclasses know the shape of a choice."""

    whole_object = chunk_object = id_prefix = ""

    def __init__(self, service: Service, body: Common, prompts: Sequence[Sequence[int]]) -> None:
        self.service, self.body, self.prompts = service, body, prompts
        self.token_text = service.token_text
        self.n = body.n or 1
        self.prompt_tokens = sum(map(len, prompts))
        self.tokens = [0] * (self.n * len(prompts))
        self.head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.settings.name,
        }

    async def prepare(self) -> None:  # noqa: B027
        """What is to be known before the first output is written."""

    @abstractmethod
    def choice(self, index: int, outputs: list[Output]) -> Dict:
        """One choice of a whole answer."""

    @abstractmethod
    def piece(self, output: Output) -> Dict:
        """One choice of a streamed event."""

    def says_something(self, output: Output) -> bool:
        """Whether an event is to be sent for it."""
        return bool(output.text or output.reason or output.logprob)

    def opening(self) -> list[Dict]:
        """Choices of a first event, before there is any text."""
        return []

    def prompt_logprobs(self, output: Output) -> list[Dict | None] | None:
        """vLLM's form: for each token of the prompt, likely tokens by their numbers."""
        count = self.body.prompt_logprobs
        if count is None:
            return None
        found: list[Dict | None] = [None]
        for score in output.prompt:
            chosen = (score.token, score.logprob, score.rank)
            likely = [(t, v, place) for place, (t, v) in enumerate(score.top[:count], 1)]
            if score.token not in (token for token, *_ in likely):
                likely.insert(0, chosen)
            found.append(
                {
                    str(token): {
                        "logprob": value,
                        "rank": rank,
                        "decoded_token": self.token_text.text(token),
                    }
                    for token, value, rank in likely
                }
            )
        return found

    def usage(self) -> Dict:
        """OpenAI's `usage`: tokens of all prompts and, so far, of all choices together."""
        generated = sum(self.tokens)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
        }

    async def whole(self, generation: Generation) -> Dict:
        """The body of an answer that is not streamed, once all its choices have ended.

        Raises:
            ApiError: 500 if the model failed on a choice, 499 if the client left before the end.
        """
        found: list[list[Output]] = [[] for _ in self.tokens]
        async with generation:
            await self.prepare()
            async for outputs in generation:
                for output in outputs:
                    found[output.index].append(output)
                    self.tokens[output.index] = output.tokens
                    if output.reason == "error":
                        raise failed()
        if not generation.complete:
            raise ApiError(499, "the client closed the request")
        choices = [self.choice(index, outputs) for index, outputs in enumerate(found)]
        whole = {"object": self.whole_object, "choices": choices, "usage": self.usage()}
        return {**self.head, **whole, **self.extras(found)}

    def extras(self, found: list[list[Output]]) -> Dict:
        """Further fields of a whole answer."""
        return {}

    async def events(self, generation: Generation, with_usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events as bytes, as the outputs come, up to `[DONE]`.

        Where the model or a text of the answer fails, the last event is OpenAI's error instead; a
        client that has left gets no further one.

        Args:
            with_usage: whether an event of its own at the end holds the token counts, which are
                null in all others then.
        """
        head = {**self.head, "object": self.chunk_object}
        if with_usage:
            head["usage"] = None
        try:
            async with generation:
                await self.prepare()
                for choice in self.opening():
                    yield _event({**head, "choices": [choice]})
                async for outputs in generation:
                    lines = b""
                    for output in outputs:
                        self.tokens[output.index] = output.tokens
                        if output.reason == "error":
                            yield lines + _event(failed().body())
                            return
                        if self.says_something(output):
                            lines += _event({**head, "choices": [self.piece(output)]})
                    if lines:
                        yield lines
        except Exception:
            # The status is sent already: without this event the client would see a broken stream.
            log.exception("a stream failed; it ends with an error")
            yield _event(failed().body())
            return
        if not generation.complete:
            return
        if with_usage:
            yield _event({**head, "choices": [], "usage": self.usage()})
        yield b"data: [DONE]\n\n"


class CompletionAnswer(Answer):
    """Choices of /v1/completions; streamed ones have the same form as whole ones."""

    whole_object = chunk_object = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.echoes: list[Echo] | None = None

    async def prepare(self) -> None:
        if self.body.echo:
            self.echoes = await echoes(self.service, self.body, self.prompts)

    def says_something(self, output: Output) -> bool:
        repeats = self.echoes is not None and output.tokens <= 1
        return repeats or super().says_something(output)

    def choice(self, index: int, outputs: list[Output]) -> Dict:
        pieces = [self.piece(output) for output in outputs]
        logprobs = None
        if self.body.logprobs is not None:
            keys = pieces[0]["logprobs"]
            logprobs = {key: [x for p in pieces for x in p["logprobs"][key]] for key in keys}
        text = "".join(piece["text"] for piece in pieces)
        reason = outputs[-1].reason
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        if (scores := self.prompt_logprobs(outputs[0])) is not None:
            choice["prompt_logprobs"] = scores
        return choice

    def piece(self, output: Output) -> Dict:
        """The first piece of a choice has the prompt before its own text, where it is wanted."""
        text, before, logprobs = output.text, 0, None
        if self.body.logprobs is not None:
            fields = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            logprobs = {field: [] for field in fields}
        if self.echoes is not None:
            echo = self.echoes[output.index // self.n]
            before = len(echo.text)
            if output.tokens <= 1:
                text = echo.text + text
                if logprobs is not None:
                    prompt = self.prompts[output.index // self.n]
                    self._add_prompt(logprobs, prompt, echo, output.prompt)
        if output.logprob is not None:
            self._add(logprobs, output.logprob, before + output.offset)
        return {
            "index": output.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": output.reason,
        }

    def _add_prompt(
        self, logprobs: Dict, prompt: Sequence[int], echo: Echo, scores: Sequence[TokenLogprob]
    ) -> None:
        logprobs["tokens"].append(self.token_text.text(prompt[0]))
        logprobs["token_logprobs"].append(None)  # nothing comes before it
        logprobs["top_logprobs"].append(None)
        logprobs["text_offset"].append(echo.offsets[0])
        for score, offset in zip(scores, echo.offsets[1:], strict=True):
            self._add(logprobs, score, offset)

    def _add(self, logprobs: Dict, found: TokenLogprob, offset: int) -> None:
        logprobs["tokens"].append(self.token_text.text(found.token))
        logprobs["token_logprobs"].append(found.logprob)
        # Several tokens may have one text, parts of characters above all: the likeliest speaks.
        top: dict[str, float] = {}
        likely = found.top[: self.body.logprobs]
        for token, value in (*likely, (found.token, found.logprob)):
            text = self.token_text.text(token)
            top[text] = max(value, top.get(text, value))
        logprobs["top_logprobs"].append(top)
        logprobs["text_offset"].append(offset)


class ChatAnswer(Answer):
    """Choices of /v1/chat/completions: a message where it is whole, deltas where it is streamed."""

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
        raw = self.token_text.bytes(token)
        return {"token": self.token_text.text(token), "logprob": logprob, "bytes": list(raw)}

    def extras(self, found: list[list[Output]]) -> Dict:
        scores = self.prompt_logprobs(found[0][0])
        return {} if scores is None else {"prompt_logprobs": scores}


def _chat_piece(index: int, delta: Dict, logprobs: Dict | None, reason: str | None) -> Dict:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _event(content: Dict) -> bytes:
    # ASCII: U+2028, U+2029 and U+0085 end a line for many readers of lines.
    return b"data: " + json.dumps(content).encode("ascii") + b"\n\n"


def failed() -> ApiError:
    """The answer to a request whose step raised or gave logits that are not finite."""
    return ApiError(500, "the model failed on this request; the server's log has its details")
