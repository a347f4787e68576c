# SPDX-License-Identifier: Apache-2.0
"""What the routes work with: the loaded model, its tokenizer, and a request on its way."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import Request

from ..checkpoint.reader import Checkpoint
from ..checkpoint.safetensors_io import load_json
from ..errors import CcqError
from ..evaluation.text import Tokenizer
from ..ops.gpu_memory import Device
from ..texts.chat_template import ChatTemplate, Message
from . import defaults
from .engine import DrainingError, Engine, EngineSettings, Output, QueueFullError
from .engine_model import EngineModel
from .errors import RETRY_AFTER, ApiError
from .metrics import Metrics
from .sampling import SamplingParams
from .token_text import TokenText

# Longer texts are tokenized beside the event loop, which would stand still meanwhile.
LONG_TEXT = 10_000


@dataclass(frozen=True)
class ServiceSettings:
    """What the operator chose; see `python -m paddle_ccq.serve --help`."""

    name: str
    max_length: int
    engine: EngineSettings = field(default_factory=EngineSettings)
    api_key: str | None = None
    max_body_bytes: int = 4 << 20
    threads: int | None = None
    allow_origins: tuple[str, ...] = ()  # of pages that may use the API from a browser
    device: Device | None = None  # for the experts; None: this processor
    generation_config: bool = True  # take sampling defaults from the checkpoint


class Service:
    """One served checkpoint. It answers 503 until load() is through, and after drain()."""

    def __init__(self, checkpoint: Checkpoint, settings: ServiceSettings) -> None:
        self.checkpoint, self.settings = checkpoint, settings
        self.tokenizer = Tokenizer(checkpoint.path, checkpoint.config.raw)
        self.template = ChatTemplate(checkpoint.path)
        self.token_text = TokenText(self.tokenizer)
        self.defaults, self.without_effect = defaults.SamplingDefaults(), []
        if settings.generation_config:
            self.defaults, self.without_effect = defaults.read_defaults(checkpoint.path)
        self.metrics = Metrics()
        self.created = int(time.time())
        self.engine: Engine | None = None
        self.draining = False

    def load(self) -> None:
        """Read the weights and start the engine; what takes long.

        Raises:
            CcqError: for damaged weights, or for --device gpu without experts that can
                run there.
        """
        settings = self.settings
        model = EngineModel(self.checkpoint, settings.max_length, settings.threads, settings.device)
        if settings.device and not model.gpu_bytes:
            raise CcqError(
                f"--device gpu: {self.checkpoint.path} has no experts that can run there: they must"
                " be wint2 or ccq-2t, hidden size and width multiples of 128; use --device cpu"
            )
        eos = frozenset(_end_tokens(self.checkpoint, self.tokenizer))
        engine = Engine(model, self.tokenizer.decode, eos, settings.engine, self.metrics)
        self.metrics.watch(engine.counts)
        engine.start()
        self.engine = engine
        if self.draining:
            engine.drain()

    def drain(self) -> None:
        """Take no new requests; those that run or wait go on to their end."""
        self.draining = True
        if self.engine is not None:
            self.engine.drain()

    @property
    def state(self) -> str:
        """ "loading", "ready" or "draining"; only when ready are requests taken."""
        if self.draining:
            return "draining"
        return "loading" if self.engine is None else "ready"

    def check_model(self, name: str) -> None:
        """Refuse a request for another model.

        Raises:
            ApiError: 404, naming the one that is served.
        """
        if name != self.settings.name:
            raise ApiError(
                404, f"model: {name!r} is not served here, but {self.settings.name!r}", "model",
                "model_not_found",
            )  # fmt: skip

    async def encode(self, text: str, with_bos: bool, field_name: str) -> list[int]:
        """Tokens of a text, behind the begin token if `with_bos`; `field_name` is for errors.

        Raises:
            ApiError: 400 for half a surrogate pair, which is no text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            message = f"{field_name}: half a surrogate pair at character {error.start}"
            raise ApiError(400, message, field_name, "invalid_value") from None
        if len(text) > LONG_TEXT:
            tokens = await asyncio.to_thread(self.tokenizer.encode, text)
        else:
            tokens = self.tokenizer.encode(text)
        return [self.tokenizer.bos, *tokens] if with_bos else tokens

    async def encode_chat(
        self, messages: Sequence[Message], add_special_tokens: bool | None = None
    ) -> list[int]:
        """Tokens of the messages in the model's chat template.

        Args:
            add_special_tokens: whether the begin token comes first; None: only for the plain
                template, since others write it themselves.

        Raises:
            ApiError: 400 if the template refuses the messages or fails on them.
        """
        try:
            text = self.template.render(messages)
        except ValueError as error:
            raise ApiError(400, f"messages: {error}", "messages", "invalid_value") from None
        # Another template writes the begin token itself, where the model wants one.
        with_bos = self.template.is_plain if add_special_tokens is None else add_special_tokens
        return await self.encode(text, with_bos, "messages")

    def token_budget(self, prompts: Sequence[Sequence[int]], asked: int | None, default: int | None,
             field_name: str, limit_name: str) -> int:  # fmt: skip
        """How many tokens each choice may have; 0 if only the prompt's scores are wanted."""
        limit = self.settings.max_length
        default = self.defaults.max_new_tokens or default
        longest = max(map(len, prompts))
        if not all(prompts):
            raise ApiError(400, f"{field_name}: has no tokens", field_name, "invalid_value")
        if longest > limit - (asked != 0):
            raise ApiError(
                400,
                f"{field_name}: has {longest} tokens, but prompt and answer together may have"
                f" {limit}",
                field_name,
                "context_length_exceeded",
            )
        self._check_tokens(max(map(max, prompts)), field_name)
        if asked is None:
            return limit - longest if default is None else min(default, limit - longest)
        if asked > limit - longest:
            raise ApiError(
                400,
                f"{limit_name}: {asked} with a prompt of {longest} tokens is more than the"
                f" {limit} that prompt and answer together may have",
                limit_name,
                "context_length_exceeded",
            )
        return asked

    def _check_tokens(self, largest: int, field_name: str) -> None:
        vocabulary = self.checkpoint.config.vocab_size
        if largest >= vocabulary:
            message = f"{field_name}: token {largest} is beyond the vocabulary of {vocabulary}"
            raise ApiError(400, message, field_name, "invalid_value")

    def submit(
        self, request: Request, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int
    ) -> Generation:
        """Hand `n` answers to each prompt (tokens) to the engine.

        Raises:
            ApiError: while nothing is loaded, and for what the model or the queue cannot take.
        """
        if self.engine is None:
            raise unavailable("loading")
        self._check_tokens(max(params.stop_token_ids, default=0), "stop_token_ids")
        if params.min_tokens > params.max_tokens:
            message = (
                f"min_tokens: {params.min_tokens} is more than the {params.max_tokens} tokens"
                " that the answer may have; see max_tokens"
            )
            raise ApiError(400, message, "min_tokens", "invalid_value")
        generation = Generation(self, request)
        try:
            generation.start(self.engine, prompts, params, n)
        except QueueFullError:
            message = "the queue is full; try again"
            raise ApiError(429, message, code="queue_full", headers=RETRY_AFTER) from None
        except DrainingError:
            raise unavailable("draining") from None
        self.metrics.requests.inc()
        return generation


class Generation:
    """A submitted request's outputs as they come.

    To be used in `async with`: left before its end, or by its client, the request is cancelled.
    """

    def __init__(self, service: Service, request: Request) -> None:
        self.service, self.request = service, request
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[list[Output] | None] = asyncio.Queue()

    def start(
        self, engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int
    ) -> None:
        """Submit the request and watch for its client leaving; to be called once.

        Raises:
            QueueFullError, DrainingError: as Engine.submit().
        """
        self.engine, self.left = engine, len(prompts) * n
        self.handle = engine.submit(prompts, params, self._deliver, n)
        # From the beginning: a client may leave before anyone asks for the first output.
        self.watch = asyncio.create_task(self._watch())

    @property
    def complete(self) -> bool:
        """Whether every choice has given its last output."""
        return not self.left

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.watch.cancel()
        self._cancel()

    async def __aiter__(self) -> AsyncIterator[list[Output]]:
        """All outputs that are there by now, at a time.

        Sent one by one, those of a busy moment would still be written, and each reported by
        asyncio, after the client has left: the loop learns of that only between two waits.
        """
        while self.left:
            found = await self.queue.get()
            while found is not None and not self.queue.empty():
                more = self.queue.get_nowait()
                found = None if more is None else [*found, *more]
            if found is None:
                return  # the client has gone
            self.left -= sum(output.reason is not None for output in found)
            yield found

    def _deliver(self, outputs: list[Output]) -> None:
        """In the engine's thread, which must not end because the loop already has."""
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, outputs)
        except RuntimeError:
            self.engine.cancel(self.handle)

    async def _watch(self) -> None:
        """Once the body is read, the next message from the client is that it left."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self._cancel()
        self.queue.put_nowait(None)

    def _cancel(self) -> None:
        if self.left and not self.handle.cancelled:
            self.engine.cancel(self.handle)
            self.service.metrics.cancelled.inc()


def unavailable(state: str) -> ApiError:
    """A 503 with Retry-After, for a server that is "loading" or "draining"."""
    message = "the model is being loaded" if state == "loading" else "the server is shutting down"
    return ApiError(503, message, code=state, headers=RETRY_AFTER)


def _end_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer) -> set[int]:
    """The tokenizer's end token, and those that config.json and generation_config.json list."""
    found = {tokenizer.eos}
    path = Path(checkpoint.path) / "generation_config.json"
    for source in (checkpoint.config.raw, load_json(path) if path.is_file() else {}):
        if not isinstance(source, dict):
            raise CcqError(f"{path}: not a JSON object")
        listed = source.get("eos_token_id")
        for token in listed if isinstance(listed, list) else [listed]:
            if isinstance(token, int) and not isinstance(token, bool):
                found.add(token)
    return found


def load_in_background(load: Callable[[], None], failed: Callable[[Exception], None]) -> None:
    """Load while the server already answers that it does."""

    def body() -> None:
        try:
            load()
        except Exception as error:
            failed(error)

    threading.Thread(target=body, name="load", daemon=True).start()
