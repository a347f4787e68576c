# SPDX-License-Identifier: Apache-2.0
"""Choosing the next token of one sequence from its logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks of every sequence; checked by the API before it gets here.

    temperature 0 is greedy; top_k 0 keeps all tokens; min_p drops those less likely than this part
    of the most likely one; logprobs None wants none, n the n most likely tokens beside the chosen
    one, and prompt_logprobs the same for the prompt's. `stop` strings end the text before
    themselves, `stop_token_ids` before their own text; neither they nor the model's end tokens end
    it within the first min_tokens. max_tokens 0 only reads the prompt.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of the chosen token, and the most likely tokens with theirs.

    rank 1 is the most likely token.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = field(default=())
    rank: int = 0


class Sampler:
    """The state of one sequence: its random numbers and what it has generated.

    One uniform number is drawn a token, from the request's seed and the choice's index only, so
    what else is in the batch does not matter. `ends` are the tokens that would end the answer.
    """

    def __init__(
        self,
        params: SamplingParams,
        index: int,
        prompt: Sequence[int] = (),
        ends: Collection[int] = (),
    ) -> None:
        self.params = params
        self.counts: Counter[int] = Counter()
        self.generated = 0
        # Only the repetition penalty looks at the prompt.
        self.prompt = np.unique(prompt) if params.repetition_penalty != 1 else None
        self.ends = np.array(sorted(ends), np.int64)
        entropy = None if params.seed is None else [params.seed & (2**64 - 1), index]
        self.random = np.random.Generator(np.random.PCG64(entropy))

    def next(self, logits: np.ndarray) -> tuple[int, TokenLogprob | None]:
        """The next token of float32 logits [vocab]; logprobs are of the logits as they came."""
        params = self.params
        scores = self._penalized(logits)
        if self.generated < params.min_tokens and len(self.ends):
            scores = scores.copy()
            scores[self.ends[self.ends < len(scores)]] = -np.inf
        token = int(np.argmax(scores)) if params.temperature == 0 else self._draw(scores)
        self.counts[token] += 1
        self.generated += 1
        if params.logprobs is None:
            return token, None
        return token, token_logprob(logits, token, params.logprobs)

    def _penalized(self, logits: np.ndarray) -> np.ndarray:
        """Repetition penalty over prompt and answer, the others over the answer, in this order."""
        params = self.params
        seen = np.fromiter(self.counts.keys(), np.int64)
        if self.prompt is not None:
            logits = logits.copy()
            repeated = np.union1d(self.prompt, seen)
            values = logits[repeated]
            penalty = np.float32(params.repetition_penalty)
            logits[repeated] = np.where(values > 0, values / penalty, values * penalty)
        if not self.counts or not (params.presence_penalty or params.frequency_penalty):
            return logits
        logits = logits.copy()
        times = np.fromiter(self.counts.values(), np.float32)
        logits[seen] -= params.presence_penalty + params.frequency_penalty * times
        return logits

    def _draw(self, scores: np.ndarray) -> int:
        params = self.params
        uniform = self.random.random()
        ids = None
        if 0 < params.top_k < len(scores):
            ids = np.argpartition(scores, -params.top_k)[-params.top_k :]
            ids.sort()  # a partition's order is not defined
            scores = scores[ids]
        # float64: a sum of 100,000 float32 probabilities is off by more than the smallest kept.
        # Shifted before the division, a tiny temperature gives -inf and never inf - inf.
        scores = (scores.astype(np.float64) - scores.max()) / params.temperature
        weights = np.exp(scores)
        if params.min_p > 0:
            weights[weights < params.min_p] = 0  # the largest weight is 1
        if params.top_p < 1:
            order = np.argsort(-weights, kind="stable")
            sums = np.cumsum(weights[order])
            # The smallest set whose probability reaches top_p, at least one token.
            kept = int(np.searchsorted(sums, params.top_p * sums[-1])) + 1
            order = order[:kept]
            weights = weights[order]
            ids = order if ids is None else ids[order]
        sums = np.cumsum(weights)
        place = int(np.searchsorted(sums, uniform * sums[-1], side="right"))
        place = min(place, len(sums) - 1)
        return place if ids is None else int(ids[place])


def token_logprob(logits: np.ndarray, token: int, top: int) -> TokenLogprob:
    """Natural log-probabilities of `token` and of the `top` likeliest ones, by logits [vocab].

    Equal logits share a rank.
    """
    shifted = logits - logits.max()
    # Exponentials in float32 are right to 1e-7; their sum over a large vocabulary would not be.
    total = float(np.log(np.exp(shifted).sum(dtype=np.float64)))
    best: list[int] = []
    if top:
        best = np.argpartition(-shifted, top - 1)[:top].tolist()
        best.sort(key=lambda i: (-shifted[i], i))
    likely = tuple((i, float(shifted[i]) - total) for i in best)
    rank = 1 + int(np.count_nonzero(shifted > shifted[token]))
    return TokenLogprob(token, float(shifted[token]) - total, likely, rank)
