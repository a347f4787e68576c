# SPDX-License-Identifier: Apache-2.0
"""The engine: one thread that steps the model, and a thread-safe way to submit and cancel."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .detokenizer import Detokenizer
from .engine_model import EngineModel
from .sampling import Sampler, SamplingParams, TokenLogprob
from .scheduler import Scheduler
from .scheduler import Sequence as Running

log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """More sequences are waiting than the queue holds."""


class DrainingError(Exception):
    """The engine takes no new requests."""


@dataclass(frozen=True)
class EngineSettings:
    """Limits: sequences at once, cache places, tokens of one step, waiting sequences."""

    max_sequences: int = 16
    cache_tokens: int = 32768
    step_tokens: int = 512
    max_waiting: int = 256


@dataclass(frozen=True)
class Output:
    """What one step gave one choice. `reason` ("stop", "length", "error") marks its last.

    `offset` is where the token's text begins in the choice's, held back or not. `prompt`, with the
    first output of a choice that asked for it, has the prompt's tokens from its second.
    """

    index: int
    text: str
    tokens: int  # generated so far
    logprob: TokenLogprob | None = None
    reason: str | None = None
    offset: int = 0
    prompt: tuple[TokenLogprob, ...] | None = None


class GenerationRequest:
    """A submitted request. `deliver` is called in the engine's thread with each step's outputs."""

    def __init__(self, deliver: Callable[[list[Output]], None]) -> None:
        self.deliver = deliver
        self.cancelled = False


class Observer(Protocol):
    """What metrics want to know; called in the engine's thread."""

    def prompt_done(self, tokens: int) -> None:
        """A sequence's prompt of so many tokens is computed."""
        ...

    def first_token(self, seconds: float) -> None:
        """A sequence's first token is chosen, so long after it was submitted."""
        ...

    def token(self, seconds: float) -> None:
        """Another token of a sequence is chosen, so long after the one before it."""
        ...

    def finished(self, reason: str, seconds: float) -> None:
        """A sequence has ended by itself, not by being cancelled.

        Args:
            reason: "stop", "length" or "error".
            seconds: since it was submitted.
        """
        ...


class Engine:
    """Continuous batching over one model."""

    def __init__(
        self,
        model: EngineModel,
        decode: Callable[[Sequence[int]], str],
        eos: frozenset[int],
        settings: EngineSettings,
        observer: Observer | None = None,
    ) -> None:
        self.model, self.decode, self.eos = model, decode, eos
        self.settings, self.observer = settings, observer
        self.cache = model.new_cache(settings.cache_tokens)
        self.scheduler = Scheduler(self.cache, settings.max_sequences, settings.step_tokens)
        self.draining = False
        self.steps = 0
        self._changed = threading.Condition()
        self._arrived: deque[Running] = deque()
        self._cancelled: deque[GenerationRequest] = deque()
        self._waiting = 0  # arrived or in the scheduler's queue
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread that steps the model; what was submitted before waits for it."""
        self._thread.start()

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        deliver: Callable[[list[Output]], None],
        n: int = 1,
    ) -> GenerationRequest:
        """Queue n choices of every prompt; choice i of prompt p has the index p * n + i.

        Raises:
            QueueFullError, DrainingError: nothing was queued.
            ValueError: a prompt and what it may generate do not fit the model.
        """
        longest = max(len(prompt) for prompt in prompts) + params.max_tokens
        limit = min(self.model.max_length, self.settings.cache_tokens)
        if longest > limit or not all(prompts):
            raise ValueError(f"prompts and answers must have 1 to {limit} tokens, got {longest}")
        count = len(prompts) * n
        self._check_open(count)  # before making what would be thrown away
        request = GenerationRequest(deliver)
        now = time.monotonic()
        ends = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= self.eos
        sequences = [
            Running(
                request,
                index,
                prompts[index // n],
                params,
                Sampler(params, index, prompts[index // n], ends),
                Detokenizer(self.decode, params.stop),
                ends,
                created=now,
            )
            for index in range(count)
        ]
        first: dict[tuple[int, ...], Running] = {}
        for sequence in sequences:
            twin = first.setdefault(tuple(sequence.prompt), sequence)
            sequence.twin = None if twin is sequence else twin
        with self._changed:
            self._check_open(count)
            self._waiting += count
            self._arrived.extend(sequences)
            self._changed.notify()
        return request

    def _check_open(self, count: int) -> None:
        if self.draining or self._stopping:
            raise DrainingError
        if self._waiting + count > self.settings.max_waiting:
            raise QueueFullError

    def cancel(self, request: GenerationRequest) -> None:
        """Stop a request at the next step; nothing is delivered any more."""
        request.cancelled = True
        with self._changed:
            self._cancelled.append(request)
            self._changed.notify()

    def drain(self) -> None:
        """Take nothing new; what is queued and running goes on to its end."""
        with self._changed:
            self.draining = True

    @property
    def idle(self) -> bool:
        """Whether no sequence runs or waits."""
        return not self._waiting and not self.scheduler.running

    def wait_until_idle(self, seconds: float) -> bool:
        """Whether everything ended within the time."""
        end = time.monotonic() + seconds
        while not self.idle and time.monotonic() < end:
            time.sleep(0.02)
        return self.idle

    def counts(self) -> tuple[int, int, float]:
        """Running, waiting, and the used part of the cache."""
        return len(self.scheduler.running), self._waiting, self.cache.used / self.cache.tokens

    def stop(self) -> None:
        """End the thread, dropping what runs."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._arrived or self._cancelled or self._stopping or self._busy()):
                    self._changed.wait()
                if self._stopping:
                    return
                self.scheduler.waiting.extend(self._arrived)
                self._arrived.clear()
                while self._cancelled:
                    self.scheduler.cancel(self._cancelled.popleft())
                self.scheduler.admit()
                self._waiting = len(self.scheduler.waiting)
            if self.scheduler.running:
                self._step()

    def _busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def _step(self) -> None:
        planned = self.scheduler.plan()
        outputs: dict[GenerationRequest, list[Output]] = {}

        def give(sequence: Running, output: Output) -> None:
            outputs.setdefault(sequence.request, []).append(output)

        try:
            logits = self.model.forward([piece for _, piece in planned], self.cache)
        except Exception:
            # A defect must not leave clients waiting for ever.
            log.exception("a step failed; its requests end with an error")
            for sequence, _ in planned:
                give(sequence, self._fail(sequence))
        else:
            now = time.monotonic()
            rows = iter(logits)
            for sequence, piece in planned:
                sequence.computed += len(piece.tokens)
                if not piece.wants_logits:
                    continue
                try:
                    output = self._advance(sequence, next(rows), now)
                except Exception:
                    log.exception("a sequence failed; its request ends with an error")
                    output = self._fail(sequence)
                give(sequence, output)
        self.steps += 1
        for request, found in outputs.items():
            if not request.cancelled:
                request.deliver(found)

    def _fail(self, sequence: Running) -> Output:
        self._end(sequence, "error")
        return Output(sequence.index, "", sequence.generated, None, "error")

    def _advance(self, sequence: Running, logits: np.ndarray, now: float) -> Output:
        """Choose the sequence's next token and see whether it ends there."""
        params, detokenizer = sequence.params, sequence.detokenizer
        if sequence.broken or not np.isfinite(logits).all():
            raise FloatingPointError("the model gave logits that are not finite")
        scores = None
        if params.prompt_logprobs is not None and not sequence.generated:
            scores = tuple(sequence.scores)
        if not params.max_tokens:
            self._observe(sequence, now)
            self._end(sequence, "length")
            return Output(sequence.index, "", 0, None, "length", 0, scores)
        token, logprob = sequence.sampler.next(logits)
        sequence.generated += 1
        sequence.last_token = token
        self._observe(sequence, now)
        search = sequence.generated > params.min_tokens
        reason = None
        text, offset = "", 0
        ended = token in sequence.ends
        if ended:
            reason = "stop"
        else:
            text = detokenizer.add(token, search)
            offset = detokenizer.place
            if detokenizer.stopped:
                reason = "stop"
            elif sequence.generated >= params.max_tokens:
                reason = "length"
        if reason:
            text += detokenizer.finish(search)
            if ended:
                offset = detokenizer.decoded  # an end token comes after all text
            # A stop string may be found only in what was held back.
            reason = "stop" if detokenizer.stopped else reason
            self._end(sequence, reason)
        return Output(sequence.index, text, sequence.generated, logprob, reason, offset, scores)

    def _observe(self, sequence: Running, now: float) -> None:
        if self.observer is not None:
            if sequence.last_time is not None:
                self.observer.token(now - sequence.last_time)
            else:
                self.observer.prompt_done(len(sequence.prompt))
                if sequence.generated:  # else only the prompt is read
                    self.observer.first_token(now - sequence.created)
        sequence.last_time = now

    def _end(self, sequence: Running, reason: str) -> None:
        self.scheduler.finish(sequence)
        if self.observer is not None:
            seconds = time.monotonic() - sequence.created
            self.observer.finished(reason, seconds)
