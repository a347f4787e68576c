# SPDX-License-Identifier: Apache-2.0
"""Which sequences run, and which of their tokens go into the next step.

First come, first served: the oldest waiting sequence is admitted when a slot and enough cache are
free, and nobody overtakes it, so a long request cannot be starved by short ones. A step carries
one token of every generating sequence and, in what is left of its token budget, pieces of prompts,
oldest first: a long prompt delays the others by one budget a step at most. Sequences of one request
with the same prompt compute it once: all but the first wait and copy its keys and values.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .detokenizer import Detokenizer
from .engine_model import Piece
from .kv_cache import KVCache, Region
from .sampling import Sampler, SamplingParams, TokenLogprob, token_logprob


@dataclass(eq=False)
class Sequence:
    """One choice of one request."""

    request: Any
    index: int
    prompt: SequenceOf[int]
    params: SamplingParams
    sampler: Sampler
    detokenizer: Detokenizer
    ends: frozenset[int] = frozenset()  # tokens that end the answer
    twin: Sequence | None = None  # an earlier one of the request with the same prompt
    region: Region | None = None
    computed: int = 0  # tokens whose keys and values are in the cache
    generated: int = 0
    last_token: int = -1
    created: float = 0.0
    last_time: float | None = None  # when the last token came
    scores: list[TokenLogprob] = field(default_factory=list)  # of the prompt, from its second token
    broken: bool = False  # a score was not finite

    @property
    def cache_budget(self) -> int:
        """Cache places that it may need; the last generated token is never fed back."""
        return len(self.prompt) + max(1, self.params.max_tokens) - 1

    def score(self, logits: np.ndarray) -> None:
        """Take up logits [rows, vocab] of the prompt's next tokens, each for the one after it."""
        for row in logits:
            self.broken |= not np.isfinite(row).all()
            token = self.prompt[len(self.scores) + 1]
            self.scores.append(token_logprob(row, token, self.params.prompt_logprobs))


class Scheduler:
    """Waiting and running sequences; used by the engine's thread alone."""

    def __init__(self, cache: KVCache, max_sequences: int, step_tokens: int) -> None:
        self.cache = cache
        self.max_sequences = max_sequences
        self.step_tokens = step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission

    def admit(self) -> None:
        """Start the oldest waiting sequences, as long as a slot and room in the cache are free."""
        while self.waiting and len(self.running) < self.max_sequences:
            region = self.cache.allocate(self.waiting[0].cache_budget)
            if region is None:
                return
            sequence = self.waiting.popleft()
            sequence.region = region
            self.running.append(sequence)

    def plan(self) -> list[tuple[Sequence, Piece]]:
        """The next step's pieces."""
        planned = []
        generating = sum(s.computed >= len(s.prompt) for s in self.running)
        # At least one, so that prompts go on however many sequences generate.
        budget = max(1, self.step_tokens - generating)
        for s in self.running:
            if self._waits_for_twin(s):
                continue
            if s.computed >= len(s.prompt):
                planned.append((s, Piece([s.last_token], s.computed, s.region)))
            elif budget > 0:
                end = min(len(s.prompt), s.computed + budget)
                budget -= end - s.computed
                tokens = s.prompt[s.computed : end]
                score = None if s.params.prompt_logprobs is None else s.score
                piece = Piece(tokens, s.computed, s.region, end == len(s.prompt), score)
                planned.append((s, piece))
        return planned

    def _waits_for_twin(self, s: Sequence) -> bool:
        """Copies what the twin has computed once that is the whole prompt; before, it waits.

        The prompt's last token is computed anew: its logits are what the first choice is made from.
        A twin that has ended has left its place in the cache, and nothing to copy.
        """
        if s.computed or s.twin is None or s.twin.region is None:
            return False
        if s.twin.computed < len(s.prompt):
            return True
        self.cache.copy(s.twin.region, s.region, len(s.prompt) - 1)
        s.computed = len(s.prompt) - 1
        s.scores, s.broken = s.twin.scores, s.twin.broken
        return False

    def finish(self, sequence: Sequence) -> None:
        """Give back what a running sequence holds."""
        self.running.remove(sequence)
        self.cache.release(sequence.region)
        sequence.region = None

    def cancel(self, request: Any) -> int:
        """Forget all sequences of a request; how many there were."""
        stopped = [s for s in self.running if s.request is request]
        for sequence in stopped:
            self.finish(sequence)
        before = len(self.waiting)
        self.waiting = deque(s for s in self.waiting if s.request is not request)
        return len(stopped) + before - len(self.waiting)
