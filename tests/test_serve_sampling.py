# SPDX-License-Identifier: Apache-2.0
"""Sampling draws from the distribution that the parameters describe; text comes in whole parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from helpers.server import tokenizer
from paddle_ccq.serving.detokenizer import MAX_UNFINISHED, Detokenizer
from paddle_ccq.serving.sampling import Sampler, SamplingParams

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def frequencies(count: int = 4000, **params: float) -> np.ndarray:
    sampler = Sampler(SamplingParams(1, seed=1, **params), 0)
    drawn = [sampler._draw(LOGITS) for _ in range(count)]
    return np.bincount(drawn, minlength=len(LOGITS)) / count


@pytest.mark.parametrize(
    "params,wanted",
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.79}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.9}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"top_p": 0.55, "top_k": 3}, [0.625, 0.375, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"top_p": 0}, [1, 0, 0, 0]),
        ({"min_p": 0.5}, [0.625, 0.375, 0, 0]),
        ({"min_p": 0.2, "top_p": 0.9}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"min_p": 1}, [1, 0, 0, 0]),
        ({"temperature": 1e-9}, [1, 0, 0, 0]),
        ({"top_k": 99}, [0.5, 0.3, 0.15, 0.05]),
    ],
)
def test_distribution(params: dict[str, float], wanted: list[float]) -> None:
    found = frequencies(**params)
    assert np.abs(found - wanted).max() < 0.03  # three standard errors are 0.024
    assert (found[np.asarray(wanted) == 0] == 0).all()


def test_penalties_count_what_was_generated() -> None:
    logits = np.array([1.0, 0.9, 0.0], np.float32)
    sampler = Sampler(SamplingParams(9, temperature=0, frequency_penalty=0.3), 0)
    assert [sampler.next(logits)[0] for _ in range(4)] == [0, 1, 0, 1]
    sampler = Sampler(SamplingParams(9, temperature=0, presence_penalty=2.0), 0)
    assert [sampler.next(logits)[0] for _ in range(4)] == [0, 1, 2, 0]
    assert logits.tolist() == pytest.approx([1.0, 0.9, 0.0])  # the caller's are left alone


def test_logprobs_are_of_the_models_distribution() -> None:
    sampler = Sampler(SamplingParams(1, temperature=0, presence_penalty=2.0, logprobs=2), 0)
    token, found = sampler.next(LOGITS)
    assert (token, found.token) == (0, 0)
    assert math.exp(found.logprob) == pytest.approx(0.5)
    assert [i for i, _ in found.top] == [0, 1]
    token, found = sampler.next(LOGITS)
    assert token == 1 and math.exp(found.logprob) == pytest.approx(0.3)


def test_a_repetition_penalty_is_over_prompt_and_answer() -> None:
    """As Keskar et al. (2019) define it: logits above 0 are divided, those below multiplied."""
    logits = np.array([2.0, 1.9, -1.0, -1.5], np.float32)
    params = SamplingParams(9, temperature=0, repetition_penalty=1.6, logprobs=0)
    sampler = Sampler(params, 0, [3, 0, 0])
    assert sampler._penalized(logits).tolist() == pytest.approx([1.25, 1.9, -1.0, -2.4])
    assert sampler.next(logits)[0] == 1  # 0 stands in the prompt
    assert sampler._penalized(logits)[:2].tolist() == pytest.approx([1.25, 1.9 / 1.6])
    assert sampler.next(logits)[0] == 0
    with_presence = SamplingParams(9, repetition_penalty=2, presence_penalty=1)
    sampler = Sampler(with_presence, 0, [0])
    sampler.counts[0] = 1
    assert sampler._penalized(logits)[0] == 0.0  # the repetition penalty comes first
    plain = Sampler(SamplingParams(9, repetition_penalty=1), 0, [0])
    assert plain._penalized(logits) is logits and logits[0] == 2.0


def test_no_token_that_ends_the_answer_comes_before_min_tokens() -> None:
    logits = np.array([9.0, 1.0, 8.0, 0.0], np.float32)
    for params in ({"temperature": 0}, {"seed": 1, "top_k": 1}, {"seed": 1, "top_p": 0}):
        sampler = Sampler(SamplingParams(9, min_tokens=2, logprobs=1, **params), 0, [], {0, 2, 99})
        found = [sampler.next(logits) for _ in range(4)]
        assert [token for token, _ in found] == [1, 1, 0, 0]
        # Reported are the model's own probabilities.
        assert all(logprob.top[0][0] == 0 for _, logprob in found)


TEXTS = [
    "Hello world",
    "naïve – “quoted” …",
    "日本語のテキスト",
    "👩‍👩‍👧 family 🏳️‍🌈",
    "a\n\n b\t c",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_add_up(text: str) -> None:
    tokens = tokenizer().encode(text)
    detokenizer = Detokenizer(tokenizer().decode)
    pieces = [detokenizer.add(token) for token in tokens] + [detokenizer.finish()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(4, 8191), max_size=40))
def test_any_tokens_give_the_text_of_all(tokens: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer().decode)
    found = "".join([detokenizer.add(token) for token in tokens] + [detokenizer.finish()])
    assert found == tokenizer().decode(tokens)


def test_bytes_that_never_become_a_character_come_out_in_time() -> None:
    detokenizer = Detokenizer(lambda tokens: "\ufffd" * len(tokens))
    pieces = [detokenizer.add(0) for _ in range(3 * MAX_UNFINISHED)]
    assert sum(map(len, pieces)) >= 2 * MAX_UNFINISHED


def letters(text: str, stop: list[str]) -> tuple[list[str], bool]:
    """The pieces when every letter is a token."""
    detokenizer = Detokenizer(lambda tokens: "".join(map(chr, tokens)), stop)
    pieces = []
    for letter in text:
        pieces.append(detokenizer.add(ord(letter)))
        if detokenizer.stopped:
            return pieces, True
    return [*pieces, detokenizer.finish()], False


def test_a_stop_string_is_found_across_tokens_and_never_shown() -> None:
    pieces, stopped = letters("one END two", ["END"])
    assert stopped and "".join(pieces) == "one "
    pieces, stopped = letters("one EN", ["END"])
    assert not stopped and "".join(pieces) == "one EN"
    assert pieces[:4] == ["o", "n", "e", " "] and pieces[4] == ""  # held only while it may match
    assert "".join(letters("aab", ["ab"])[0]) == "a"
    assert "".join(letters("xyz", ["z", "yz"])[0]) == "x"


def test_stop_strings_are_not_looked_for_before_they_may_end_the_text() -> None:
    detokenizer = Detokenizer(lambda tokens: "".join(map(chr, tokens)), ["ab"])
    pieces = [detokenizer.add(ord(letter), search=i > 3) for i, letter in enumerate("ababcab")]
    assert "".join(pieces) == "ababc" and detokenizer.stopped


@given(
    st.lists(st.integers(4, 8191), max_size=30), st.lists(st.text("ae \n", min_size=1), max_size=3)
)
def test_places_do_not_depend_on_what_is_held_back(tokens: list[int], stop: list[str]) -> None:
    """And a text cut where its tokens begin is the text of the tokens before."""
    free, held = Detokenizer(tokenizer().decode), Detokenizer(tokenizer().decode, stop)
    places, ends = [], []
    for token in tokens:
        free.add(token)
        held.add(token)
        places.append((free.place, held.place))
        ends.append(len(tokenizer().decode(tokens[: len(places)])))
    assert all(a == b for a, b in places)
    found = [place for place, _ in places]
    assert found == sorted(found)
    whole = tokenizer().decode(tokens)
    for place, end, token in zip(found[1:], ends, tokens[1:], strict=False):
        # One less where the token goes on with the character that the one before began.
        assert place in (end, end - 1) or "\ufffd" in tokenizer().decode([token])
        assert place <= len(whole)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stopping_agrees_with_the_whole_text(text: str, stop: list[str]) -> None:
    pieces, stopped = letters(text, stop)
    ends = [text.find(s) + len(s) for s in stop if s in text]
    assert stopped == bool(ends)
    if not ends:
        assert "".join(pieces) == text
        return
    seen = text[: min(ends)]  # the token that completes the first stop string is the last
    assert "".join(pieces) == seen[: min(seen.find(s) for s in stop if s in seen)]
