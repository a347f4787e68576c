# SPDX-License-Identifier: Apache-2.0
"""Perplexity, KL divergence and top-1 agreement, kept as sums per window so that models pair up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import paddle
from paddle import Tensor

from ..errors import CcqError

if TYPE_CHECKING:
    from ..models.ernie import Ernie

# Logits computed at once. 16 MiB as float32: large enough for full-speed products, small enough
# that the allocator reuses the memory instead of asking the system for it each time.
CHUNK_LOGITS = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error over windows (None with fewer than two)."""

    mean: float
    error: float | None


@dataclass(frozen=True)
class WindowScore:
    """One model on one window: values of each predicted token (every one but the first)."""

    nll: np.ndarray  # float64, nats
    # Both None without a reference, and for the reference itself.
    kl: np.ndarray | None = None  # float64, KL(reference || model)
    agree: np.ndarray | None = None  # bool: the same most likely token as the reference's


class TextScores:
    """One model on a text."""

    def __init__(self, windows: Sequence[WindowScore]) -> None:
        self.tokens = np.array([score.nll.size for score in windows])
        self.nll = np.array([score.nll.sum() for score in windows])
        self.compared = all(score.kl is not None for score in windows)
        if self.compared:
            self.kl = np.array([score.kl.sum() for score in windows])
            self.agree = np.array([score.agree.sum() for score in windows], dtype=np.float64)
            self.token_kl = np.concatenate([score.kl for score in windows])

    def summary(self) -> dict[str, float | int | None]:
        """Means over tokens with their standard errors over windows, in nats.

        Raises:
            CcqError: if logits are not finite: the weights are damaged.
        """
        nll = mean_per_token(self.nll, self.tokens)
        if not math.isfinite(nll.mean):
            raise CcqError("the model's logits are not finite: its weights are damaged")
        result: dict[str, float | int | None] = {
            "windows": len(self.tokens),
            "predicted_tokens": int(self.tokens.sum()),
            "nll": nll.mean,
            "nll_error": nll.error,
            "perplexity": float(np.exp(nll.mean)),
        }
        if self.compared:
            kl = mean_per_token(self.kl, self.tokens)
            top1 = mean_per_token(self.agree, self.tokens)
            result |= {
                "kl_mean": kl.mean,
                "kl_mean_error": kl.error,
                "kl_p99": float(np.percentile(self.token_kl, 99)),
                "top1_agreement": top1.mean,
                "top1_agreement_error": top1.error,
            }
        return result


def mean_per_token(sums: np.ndarray, tokens: np.ndarray) -> Estimate:
    """Mean over all tokens from sums per window, with the error of a ratio of two sums."""
    total, count = tokens.sum(), len(tokens)
    mean = sums.sum() / total
    if count < 2:
        return Estimate(float(mean), None)
    spread = np.square(sums - mean * tokens).sum() * count / (count - 1)
    return Estimate(float(mean), float(math.sqrt(spread) / total))


def paired_difference(a: TextScores, b: TextScores, quantity: str = "nll") -> Estimate:
    """Mean of a - b per token ("nll" or "kl") on the same windows.

    The windows' own difficulty cancels, so the error is far smaller than that of either mean.
    """
    if not np.array_equal(a.tokens, b.tokens):
        raise ValueError("scores of different windows cannot be paired")
    return mean_per_token(getattr(a, quantity) - getattr(b, quantity), a.tokens)


@paddle.no_grad()
def score_window(
    window: np.ndarray, models: Mapping[str, Ernie], reference: str | None
) -> dict[str, WindowScore]:
    """Each model's scores on one window; the model named `reference` is compared with the others.

    Logits are computed in chunks of tokens, all models side by side, so that the
    reference's logits are computed once and none are kept.
    """
    tokens = paddle.to_tensor(window).unsqueeze(0)
    hidden = {name: model.hidden_states(tokens)[0, :-1] for name, model in models.items()}
    targets = tokens[0, 1:].unsqueeze(1)
    order = sorted(models, key=lambda name: name != reference)
    columns: dict[str, list[list[np.ndarray]]] = {name: [] for name in models}
    rows = max(1, CHUNK_LOGITS // next(iter(models.values())).config.vocab_size)
    for first in range(0, len(window) - 1, rows):
        expected = None
        for name in order:
            logits = models[name].logits(hidden[name][first : first + rows])
            normalizer, exponentials, total = log_sum_exp(logits)
            chosen = paddle.take_along_axis(logits, targets[first : first + rows], axis=1)
            column = [normalizer - chosen.astype("float64").squeeze(1).numpy()]
            if reference is not None:
                best = paddle.argmax(logits, axis=-1).numpy()
            if name == reference:
                expected = (logits, normalizer, exponentials / total, best)
            elif reference is not None:
                their_logits, their_normalizer, probabilities, their_best = expected
                # sum p (log p - log q), with the normalizers (which sum p leaves alone) taken out
                # of the sum: the rest is a small difference, which float32 holds well.
                gap = (probabilities * (their_logits - logits)).sum(axis=-1)
                gap = gap.astype("float64").numpy()
                column += [gap - their_normalizer + normalizer, best == their_best]
            columns[name].append(column)
    return {
        name: WindowScore(*(np.concatenate(parts) for parts in zip(*chunks, strict=True)))
        for name, chunks in columns.items()
    }


def log_sum_exp(logits: Tensor) -> tuple[np.ndarray, Tensor, Tensor]:
    """float64 log of the sum of exponentials per row, the scaled exponentials and their sum."""
    peak = logits.max(axis=-1, keepdim=True)
    exponentials = paddle.exp(logits - peak)
    total = exponentials.sum(axis=-1, keepdim=True)
    normalizer = np.log(total.astype("float64").numpy()) + peak.astype("float64").numpy()
    return normalizer[:, 0], exponentials, total
