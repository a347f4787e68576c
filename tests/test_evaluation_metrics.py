# SPDX-License-Identifier: Apache-2.0
"""Metrics against direct float64 computation, and the windows of tokens they are taken on."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

paddle = pytest.importorskip("paddle")

from paddle_ccq.errors import CcqError  # noqa: E402
from paddle_ccq.evaluation import metrics  # noqa: E402
from paddle_ccq.evaluation.run import score_text, summarize  # noqa: E402
from paddle_ccq.evaluation.text import cut_windows  # noqa: E402

VOCAB = 50


class TableModel:
    """Logits depend on the last token only, so that they can be checked by hand."""

    def __init__(self, seed: int, scale: float = 3.0) -> None:
        self.table = np.random.default_rng(seed).standard_normal((VOCAB, VOCAB)) * scale
        self.table = self.table.astype(np.float32)
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self.calls = 0

    def hidden_states(self, tokens):
        self.calls += 1
        return tokens.unsqueeze(-1)

    def logits(self, hidden):
        return paddle.to_tensor(self.table[hidden.numpy()[..., 0]])

    def log_probabilities(self, window):
        rows = self.table[window[:-1]].astype(np.float64)
        return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def make_windows(count: int = 7, length: int = 33) -> list[np.ndarray]:
    return list(np.random.default_rng(1).integers(0, VOCAB, (count, length)))


def test_against_direct_computation(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK_LOGITS", VOCAB * 5)  # several chunks per window
    models = {"a": TableModel(1), "ref": TableModel(2), "b": TableModel(3, 1.0)}
    windows = make_windows()
    scores = score_text(models, windows, "ref", threads=2)
    assert all(model.calls == len(windows) for model in models.values())
    assert not scores["ref"].compared
    for name in ("a", "b"):
        nll, kl, agree = [], [], []
        for window in windows:
            p, q = models["ref"].log_probabilities(window), models[name].log_probabilities(window)
            nll.append(-q[np.arange(len(q)), window[1:]])
            kl.append((np.exp(p) * (p - q)).sum(axis=1))
            agree.append(p.argmax(axis=1) == q.argmax(axis=1))
        summary = scores[name].summary()
        assert summary["predicted_tokens"] == 7 * 32
        assert summary["nll"] == pytest.approx(np.mean(nll), rel=1e-6)
        assert summary["perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-6)
        assert summary["kl_mean"] == pytest.approx(np.mean(kl), rel=1e-5)
        assert summary["kl_p99"] == pytest.approx(np.percentile(kl, 99), rel=1e-5)
        assert summary["top1_agreement"] == np.mean(agree)
        # Windows of one length: the usual error of a mean over windows.
        error = np.mean(nll, axis=1).std(ddof=1) / np.sqrt(7)
        assert summary["nll_error"] == pytest.approx(error, rel=1e-6)


def test_a_model_against_itself():
    model = TableModel(1)
    scores = score_text({"model": model, "again": model}, make_windows(), "again")
    summary = summarize(scores, None, "again")["model"]["text"]
    assert summary["kl_mean"] == 0 and summary["kl_p99"] == 0
    assert summary["top1_agreement"] == 1
    assert summary["nll_over_reference"] == 0 and summary["nll_over_reference_error"] == 0


def test_small_divergences_keep_their_digits():
    """The KL of nearly equal models is second order in the difference; it must not drown."""
    a, b = TableModel(1), TableModel(1)
    noise = np.random.default_rng(5).standard_normal(b.table.shape) * 0.01
    b.table = (b.table + noise).astype(np.float32)
    windows = make_windows()
    expected = []
    for window in windows:
        p, q = a.log_probabilities(window), b.log_probabilities(window)
        expected.append((np.exp(p) * (p - q)).sum(axis=1))
    result = score_text({"a": a, "b": b}, windows, "a")["b"].summary()["kl_mean"]
    assert np.mean(expected) < 1e-4
    assert result == pytest.approx(np.mean(expected), rel=1e-2)


def test_paired_difference_by_hand():
    def scores(values):
        return metrics.TextScores([metrics.WindowScore(np.array(v, float)) for v in values])

    a = scores([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    b = scores([[1.0, 1.0], [2.0, 4.0], [5.0, 6.5]])
    # Per window: 0.5, 0.5, -0.25.
    difference = metrics.paired_difference(a, b)
    assert difference.mean == pytest.approx(0.25)
    assert difference.error == pytest.approx(np.std([0.5, 0.5, -0.25], ddof=1) / np.sqrt(3))
    with pytest.raises(ValueError, match="different windows"):
        metrics.paired_difference(a, scores([[1.0], [2.0]]))


def test_one_window_has_no_error():
    summary = score_text({"m": TableModel(1)}, make_windows(1))["m"].summary()
    assert summary["nll_error"] is None


def test_damaged_weights_are_reported():
    model = TableModel(1)
    model.table[:] = np.nan
    with pytest.raises(CcqError, match="not finite"):
        score_text({"m": model}, make_windows())["m"].summary()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 500), st.integers(2, 60), st.one_of(st.none(), st.integers(60, 600)))
def test_windows_cover_the_stream(size, window, max_tokens):
    stream = np.arange(size)
    windows = cut_windows(stream, window, max_tokens)
    if size < window:
        assert len(windows) == 1 and np.array_equal(windows[0], stream)
        return
    starts = [part[0] for part in windows]
    assert all(part.size == window and part[0] % window == 0 for part in windows)
    for start, part in zip(starts, windows, strict=True):
        assert np.array_equal(part, stream[start : start + window])
    assert starts == sorted(set(starts))
    if max_tokens is None or max_tokens >= size:
        assert len(windows) == size // window
    else:
        assert len(windows) == min(max_tokens // window, size // window)
        # Evenly spread: steps differ by at most one window.
        steps = np.diff(starts) // window
        assert steps.size == 0 or steps.max() - steps.min() <= 1


def test_window_errors():
    with pytest.raises(CcqError, match="--window 1"):
        cut_windows(np.arange(9), 1)
    with pytest.raises(CcqError, match="--max-tokens 3"):
        cut_windows(np.arange(9), 4, 3)
