# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of answers and prompts: right, complete, and at the right place of the text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import openai
import tokenizers
from tokenizers import decoders
from tokenizers.models import BPE

from helpers.server import (
    EXAMPLES,
    NAME,
    checkpoint,
    reference,
    rolling_windows,
    running,
    tokenizer,
)
from paddle_ccq.evaluation.tasks import read_items
from paddle_ccq.serving.answers import CompletionAnswer
from paddle_ccq.serving.engine import Output
from paddle_ccq.serving.protocol import CompletionRequest
from paddle_ccq.serving.sampling import TokenLogprob
from paddle_ccq.serving.service import Service
from paddle_ccq.serving.token_text import TokenText

PROMPT = "Q: 585 - 17 = ?\nA:"
TEXTS = [PROMPT, "naïve – “quoted” …", "日本語のテキスト", "👩‍👩‍👧 family 🏳️‍🌈", "a\n\n b\t c", "x"]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Service]]:
    # Steps shorter than a prompt, and than the rows that are scored at a time.
    flags = ("--max-num-seqs", "8", "--max-num-batched-tokens", "40")
    with running(*flags) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: tuple[str, Service]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **given: Any) -> openai.types.Completion:
    return client.completions.create(model=NAME, **{"temperature": 0, **given})


def test_an_echo_has_the_prompts_log_probabilities(client: openai.OpenAI) -> None:
    long = " ".join(item.prompt for item in read_items(EXAMPLES / "data" / "word.jsonl")[:3])
    for text in (*TEXTS, long):
        tokens = [tokenizer().bos, *tokenizer().encode(text)]
        wanted = reference(tokens, 3)
        choice = ask(client, prompt=text, max_tokens=0, echo=True, logprobs=3).choices[0]
        found = choice.logprobs
        assert choice.text == text and choice.finish_reason == "length"
        assert len(found.tokens) == len(tokens)
        assert found.token_logprobs == [None, *(score.logprob for score in wanted)]
        assert found.top_logprobs[0] is None
        for top, score in zip(found.top_logprobs[1:], wanted, strict=True):
            assert max(top.values()) == score.top[0][1] and len(top) <= 4
        starts = [0, *(start for start, _ in tokenizer().fast.encode(text).offsets)]
        assert found.text_offset == starts


@pytest.mark.parametrize("longest", [7, 16, 1000])
def test_rolling_log_likelihood_of_a_text_is_the_models(
    client: openai.OpenAI, longest: int
) -> None:
    text = (EXAMPLES / "data" / "public-domain-sample.txt").read_text("utf-8")[:300]
    tokens = tokenizer().encode(text)
    windows = rolling_windows(tokens, longest)
    assert [token for _, scored in windows for token in scored] == tokens
    assert (len(windows) > 2) == (longest < 1000)
    wanted = sum(
        score.logprob
        for context, scored in windows
        for score in reference([*context, *scored], 1)[len(context) - 1 :]
    )
    batch = [[*context, *scored] for context, scored in windows]
    for asked, end in (({"max_tokens": 0}, None), ({"max_tokens": 1}, -1)):
        choices = ask(client, prompt=batch, echo=True, logprobs=1, **asked).choices
        found = sum(
            sum(choice.logprobs.token_logprobs[len(context) : end])
            for choice, (context, _) in zip(choices, windows, strict=True)
        )
        assert found == pytest.approx(wanted, rel=1e-9)


def test_an_echo_goes_before_the_answer(client: openai.OpenAI) -> None:
    for given in (PROMPT, [tokenizer().bos, *tokenizer().encode(PROMPT)]):
        plain = ask(client, prompt=given, max_tokens=6, logprobs=2).choices[0]
        whole = ask(client, prompt=given, max_tokens=6, logprobs=2, echo=True)
        echo = ask(client, prompt=given, max_tokens=0, logprobs=2, echo=True)
        [both], [prompt] = whole.choices, echo.choices
        assert (echo.usage.completion_tokens, whole.usage.completion_tokens) == (0, 6)
        assert prompt.text == PROMPT and both.text == PROMPT + plain.text
        a, b, c = prompt.logprobs, plain.logprobs, both.logprobs
        assert c.tokens == a.tokens + b.tokens
        assert c.token_logprobs == a.token_logprobs + b.token_logprobs
        assert c.top_logprobs == a.top_logprobs + b.top_logprobs
        assert c.text_offset == a.text_offset + [len(PROMPT) + at for at in b.text_offset]
        assert ask(client, prompt=given, max_tokens=6, echo=True).choices[0].text == both.text


def test_batches_of_texts_and_of_tokens_are_what_each_is_alone(client: openai.OpenAI) -> None:
    ids = [[tokenizer().bos, *tokenizer().encode(text)] for text in TEXTS]
    asked = dict(max_tokens=1, echo=True, logprobs=1)
    alone = [ask(client, prompt=text, **asked).choices[0] for text in TEXTS]
    for batch in (TEXTS, ids):
        for n in (1, 2):
            choices = ask(client, prompt=batch, n=n, **asked).choices
            assert [c.index for c in choices] == list(range(n * len(TEXTS)))
            for choice, wanted in zip(choices[::n], alone, strict=True):
                assert (choice.text, choice.logprobs) == (wanted.text, wanted.logprobs)
            assert {c.text for c in choices} == {c.text for c in alone}
    # Equal prompts compute their scores once and have them all.
    four = ask(client, prompt=[ids[0], ids[0]], n=2, **asked).choices
    assert all(choice.logprobs == alone[0].logprobs for choice in four)


@pytest.mark.parametrize("max_tokens", [0, 1, 9])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_a_streamed_echo_adds_up_to_the_whole(
    client: openai.OpenAI, max_tokens: int, logprobs: int | None
) -> None:
    given = dict(prompt=TEXTS[:3], n=2, max_tokens=max_tokens, logprobs=logprobs, echo=True)
    whole = ask(client, **given)
    options = {"include_usage": True}
    chunks = list(ask(client, **given, stream=True, stream_options=options))
    assert chunks[-1].usage == whole.usage
    check_stream(whole, [choice for chunk in chunks for choice in chunk.choices])


def check_stream(whole: openai.types.Completion, pieces: list[Any]) -> None:
    """Streamed pieces have the whole answer's text, log-probabilities and offsets."""
    for choice in whole.choices:
        own = [piece for piece in pieces if piece.index == choice.index]
        assert "".join(piece.text for piece in own) == choice.text
        assert [p.finish_reason for p in own if p.finish_reason] == [choice.finish_reason]
        if choice.logprobs is None:
            assert all(piece.logprobs is None for piece in own)
            continue
        for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [x for piece in own for x in getattr(piece.logprobs, field)]
            assert joined == getattr(choice.logprobs, field)


def test_choices_by_likelihood_are_evaluates(client: openai.OpenAI) -> None:
    """The sum over a choice's tokens, as lm-eval takes it, against evaluate's mean."""
    pytest.importorskip("paddle")
    from paddle_ccq.evaluation.tasks import choice_likelihoods
    from paddle_ccq.models.ernie import Ernie
    from paddle_ccq.models.weights import EXACT, weight_source

    items = read_items(EXAMPLES / "data" / "defmc.jsonl", 8)
    encode = tokenizer().encode
    prompts = [[tokenizer().bos, *encode(item.prompt)] for item in items]
    choices = [[encode(f" {choice}") for choice in item.choices] for item in items]
    wanted = choice_likelihoods(Ernie(weight_source(checkpoint(), EXACT)), prompts, choices)
    for prompt, options, means in zip(prompts, choices, wanted, strict=True):
        batch = [prompt + option for option in options]
        asked = ask(client, prompt=batch, max_tokens=0, echo=True, logprobs=1).choices
        found = [np.mean(c.logprobs.token_logprobs[len(prompt) :]) for c in asked]
        assert np.allclose(found, means, atol=1e-4)


def test_prompt_logprobs_as_vllm_has_them(client: openai.OpenAI) -> None:
    tokens = [tokenizer().bos, *tokenizer().encode(PROMPT)]
    wanted = reference(tokens, 3)
    asked = {"extra_body": {"prompt_logprobs": 3}}
    for found in (
        ask(client, prompt=PROMPT, max_tokens=1, **asked).choices[0],
        ask(client, prompt=PROMPT, max_tokens=0, **asked).choices[0],
        ask(client, prompt=PROMPT, max_tokens=0, echo=True, logprobs=5, **asked).choices[0],
    ):
        first, *rest = found.prompt_logprobs
        assert first is None and len(rest) == len(tokens) - 1
        for entry, score in zip(rest, wanted, strict=True):
            assert {int(t): e["logprob"] for t, e in entry.items()} == {
                **dict(score.top), score.token: score.logprob
            }  # fmt: skip
            chosen = entry[str(score.token)]
            assert chosen["rank"] == score.rank
            assert chosen["decoded_token"] == TokenText(tokenizer()).text(score.token)
            assert sorted(e["rank"] for e in entry.values())[:3] == [1, 2, 3]
    assert not hasattr(ask(client, prompt=PROMPT).choices[0], "prompt_logprobs")
    chat = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "hi"}], max_tokens=1, **asked
    )
    assert len(chat.prompt_logprobs) == chat.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs"):
        ask(client, prompt=PROMPT, stream=True, **asked)


def test_a_prompt_may_fill_the_context_where_nothing_is_generated() -> None:
    with running("--max-model-len", "48") as (base, _):
        client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
        asked = dict(max_tokens=0, echo=True, logprobs=0)
        choice = ask(client, prompt=[5] * 48, **asked).choices[0]
        assert len(choice.logprobs.tokens) == 48
        for given in ({"prompt": [5] * 49, **asked}, {"prompt": [5] * 48, "max_tokens": 1}):
            with pytest.raises(openai.BadRequestError, match="tokens"):
                ask(client, **given)
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, prompt="a", max_tokens=0)
        assert caught.value.param == "max_tokens"


@pytest.mark.parametrize("stop_length", [2, 3, 5, 9])
@pytest.mark.parametrize("prompt", TEXTS)
def test_offsets_are_the_same_where_a_stop_string_holds_text_back(
    client: openai.OpenAI, prompt: str, stop_length: int
) -> None:
    given = dict(prompt=prompt, max_tokens=24, logprobs=1, extra_body={"ignore_eos": True})
    free = ask(client, **given).choices[0]
    # Begins as the text does in some place, and is never complete.
    held = [free.text[at : at + stop_length - 1] + "\x00" for at in range(0, len(free.text), 3)]
    whole = ask(client, **given, stop=held[:16])
    assert whole.choices[0].text == free.text
    assert whole.choices[0].logprobs == free.logprobs
    check_stream(whole, [c for chunk in ask(client, **given, stop=held[:16], stream=True)
                         for c in chunk.choices])  # fmt: skip
    # One that is complete: the tokens until there, where they were.
    stop = free.text[7 : 7 + stop_length]
    whole = ask(client, **given, stop=stop)
    ended = whole.choices[0]
    assert ended.text == free.text[: free.text.index(stop)] and ended.finish_reason == "stop"
    assert ended.logprobs.text_offset == free.logprobs.text_offset[: len(ended.logprobs.tokens)]
    check_stream(whole, [c for chunk in ask(client, **given, stop=stop, stream=True)
                         for c in chunk.choices])  # fmt: skip


def test_offsets_are_where_the_tokens_are(client: openai.OpenAI) -> None:
    """Of a sampled text with parts of characters, whose tokens' texts do not tell."""
    given = dict(prompt="日本語 👩‍👩‍👧 é", max_tokens=60, temperature=1.5, seed=4, logprobs=0)
    choice = ask(client, **given, extra_body={"ignore_eos": True}).choices[0]
    offsets, tokens = choice.logprobs.text_offset, choice.logprobs.tokens
    assert offsets == sorted(offsets) and offsets[0] == 0
    for at, token in zip(offsets, tokens, strict=True):
        if "\ufffd" not in token and token not in TokenText(tokenizer()).added.values():
            assert choice.text.startswith(token, at)
    assert any("\ufffd" in token for token in tokens)


def test_an_end_token_comes_after_all_text(client: openai.OpenAI) -> None:
    choice = ask(client, prompt=PROMPT, max_tokens=200, logprobs=0).choices[0]
    if choice.finish_reason == "stop":
        assert choice.logprobs.text_offset[-1] == len(choice.text)
    [choice] = ask(
        client, prompt=PROMPT, max_tokens=9, logprobs=0, stop=["\x00", choice.text[3:8] + "\x00"],
        extra_body={"stop_token_ids": tokenizer().encode(choice.text)[6:7]},
    ).choices  # fmt: skip
    assert choice.finish_reason == "stop" and choice.logprobs.text_offset[-1] == len(choice.text)


class Halves:
    """A tokenizer's halves of characters: five tokens of one text."""

    def text(self, token: int) -> str:
        return "\ufffd" if token < 5 else chr(token)

    def bytes(self, token: int) -> bytes:
        return bytes([0xF0 + token]) if token < 5 else chr(token).encode()


def test_the_likeliest_of_tokens_with_one_text_speaks(server: tuple[str, Service]) -> None:
    body = CompletionRequest(model=NAME, prompt="x", logprobs=4)
    top = ((2, -0.73), (65, -1.5), (3, -5.9), (66, -6.0), (4, -9.0))
    answer = CompletionAnswer(server[1], body, [[1, 2]])
    answer.token_text = Halves()
    for chosen, value in ((2, -0.73), (3, -5.9), (4, -9.0), (67, -12.0)):
        scored = TokenLogprob(chosen, value, top[:4])
        found = answer.piece(Output(0, "", 1, scored))["logprobs"]
        assert found["token_logprobs"] == [value]
        likely = {"\ufffd": -0.73, "A": -1.5, "B": -6.0}
        assert found["top_logprobs"] == [likely | ({"C": -12.0} if chosen == 67 else {})]


def test_bytes_are_known_for_parts_of_characters(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "日本語 👩‍👩‍👧"}], max_tokens=40, seed=2,
        temperature=2, logprobs=True, top_logprobs=20, extra_body={"ignore_eos": True},
    )  # fmt: skip
    parts = 0
    for entry in chat.choices[0].logprobs.content:
        for token in (entry, *entry.top_logprobs):
            assert bytes(token.bytes).decode(errors="replace") == token.token
            parts += "\ufffd" in token.token
    assert parts


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_tokens_are_those_of_the_text(text: str) -> None:
    found = TokenText(tokenizer())
    assert b"".join(map(found.bytes, tokenizer().encode(text))) == text.encode()
    assert found.text(tokenizer().bos) == tokenizer().fast.id_to_token(tokenizer().bos)
    assert found.bytes(10**9) == b""


@pytest.mark.parametrize("kind", ["metaspace", "replace", "none"])
def test_bytes_of_a_sentencepiece_vocabulary(kind: str) -> None:
    pieces = ["<unk>", "▁a", "b", "▁", "<0xE6>", "<0x97>", "<0xA5>", "\ufffd"]
    fast = tokenizers.Tokenizer(
        BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    space = decoders.Metaspace() if kind == "metaspace" else decoders.Replace("▁", " ")
    if kind != "none":
        fast.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse()])
    stand_in = type("T", (), {"fast": fast})
    found = [TokenText(stand_in).bytes(i) for i in range(1, len(pieces))]
    if kind == "none":
        assert found[1] == b"b"
        return
    assert b"".join(found[:6]).decode() == " ab 日"
    assert found[3:6] == [b"\xe6", b"\x97", b"\xa5"]
    assert found[6].decode() == "\ufffd"  # a character of its own
    assert TokenText(stand_in).text(4) == "\ufffd"


def test_every_token_of_the_example_has_bytes(tmp_path: Path) -> None:
    found = TokenText(tokenizer())
    vocabulary = json.loads(tokenizer().path.read_text("utf-8"))["model"]["vocab"]
    for written, token in vocabulary.items():
        text = tokenizer().fast.decode([token], skip_special_tokens=False)
        assert "\ufffd" in text or found.bytes(token).decode() == text, written
