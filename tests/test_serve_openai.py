# SPDX-License-Identifier: Apache-2.0
"""The server as the openai package sees it: whole, streamed, concurrent, and cancelled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import openai

from helpers.server import NAME, prompts, running, tokenizer
from paddle_ccq.serving.service import Service

PROMPT = "Q: 585 - 17 = ?\nA:"


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Service]]:
    with running("--max-num-seqs", "8", "--kv-cache-tokens", "16384") as found:
        yield found


@pytest.fixture(scope="module")
def client(server: tuple[str, Service]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def until_idle(service: Service) -> None:
    assert service.engine.wait_until_idle(10)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.param == "model"


def test_a_completion_its_counts_and_reason(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt=PROMPT, temperature=0, max_tokens=4)
    [choice] = answer.choices
    assert choice.text.startswith(" 5") and choice.finish_reason == "length"
    prompt = 1 + len(tokenizer().encode(PROMPT))
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, 4)
    assert usage.total_tokens == prompt + 4


def test_text_and_tokens_are_the_same_prompt(client: openai.OpenAI) -> None:
    tokens = [tokenizer().bos, *tokenizer().encode(PROMPT)]
    answers = [
        client.completions.create(model=NAME, prompt=given, temperature=0, max_tokens=5, n=n)
        for given, n in ((PROMPT, 1), (tokens, 1), ([PROMPT, PROMPT], 2), ([tokens], 1))
    ]
    assert [len(answer.choices) for answer in answers] == [1, 1, 4, 1]
    assert len({choice.text for answer in answers for choice in answer.choices}) == 1
    assert [choice.index for choice in answers[2].choices] == [0, 1, 2, 3]


def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    given = dict(model=NAME, prompt=PROMPT, temperature=0.8, seed=3, max_tokens=30, logprobs=1)
    whole = client.completions.create(**given, n=2)
    chunks = list(
        client.completions.create(**given, n=2, stream=True, stream_options={"include_usage": True})
    )
    for choice in whole.choices:
        pieces = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert [p.finish_reason for p in pieces if p.finish_reason] == [choice.finish_reason]
        offsets = [offset for p in pieces for offset in p.logprobs.text_offset]
        assert offsets == choice.logprobs.text_offset
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    given = dict(
        model=NAME,
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        ],
        temperature=0,
        max_completion_tokens=8,
        logprobs=True,
        top_logprobs=2,
    )
    whole = client.chat.completions.create(**given)
    [choice] = whole.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert len(choice.logprobs.content) == whole.usage.completion_tokens
    first = choice.logprobs.content[0]
    assert first.token == first.top_logprobs[0].token and len(first.top_logprobs) == 2
    assert bytes(first.bytes).decode() == first.token
    chunks = list(client.chat.completions.create(**given, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == choice.message.content
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason


def test_stop_strings_end_the_text_before_themselves(client: openai.OpenAI) -> None:
    given = dict(
        model=NAME, prompt=PROMPT, temperature=0, max_tokens=40, extra_body={"ignore_eos": True}
    )
    text = client.completions.create(**given).choices[0].text
    stop = text[9:13]  # wherever the tokens' borders are
    choice = client.completions.create(**given, stop=stop).choices[0]
    assert choice.text == text[: text.index(stop)] and choice.finish_reason == "stop"
    chunks = client.completions.create(**given, stop=["never there", stop], stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text


def test_seed_top_k_and_penalties(client: openai.OpenAI) -> None:
    def text(**more: object) -> str:
        given = dict(model=NAME, prompt=PROMPT, max_tokens=24, extra_body={"ignore_eos": True})
        return client.completions.create(**{**given, **more}).choices[0].text

    assert text(seed=5) == text(seed=5) != text(seed=6)
    greedy = text(temperature=0)
    assert text(seed=1, extra_body={"top_k": 1, "ignore_eos": True}) == greedy
    assert text(seed=1, top_p=1e-6) == greedy
    penalized = client.completions.create(
        model=NAME,
        prompt=PROMPT,
        max_tokens=24,
        temperature=0,
        frequency_penalty=2,
        presence_penalty=2,
        logprobs=0,
        extra_body={"ignore_eos": True},
    )
    tokens = penalized.choices[0].logprobs.tokens
    assert len(set(tokens)) > len(set(greedy)) / 2 and penalized.choices[0].text != greedy


def test_64_at_once_get_what_each_gets_alone(server: tuple[str, Service]) -> None:
    texts = [tokenizer().decode(prompt[1:]) for prompt in prompts(4)]

    async def main() -> None:
        client = openai.AsyncOpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)

        async def ask(text: str) -> str:
            answer = await client.completions.create(
                model=NAME, prompt=text, temperature=0, max_tokens=8
            )
            return answer.choices[0].text

        async with client:
            alone = [await ask(text) for text in texts]
            together = await asyncio.gather(*(ask(text) for text in texts * 4))
            assert together == alone * 4

    asyncio.run(main())
    until_idle(server[1])


def test_cancelled_streams_free_their_slots(server: tuple[str, Service]) -> None:
    base, service = server

    async def main() -> None:
        client = openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
        endless = dict(model=NAME, prompt=PROMPT, max_tokens=1900, extra_body={"ignore_eos": True})

        async def leave(after: int) -> None:
            stream = await client.completions.create(**endless, stream=True)
            async for _ in stream:
                after -= 1
                if after == 0:
                    break
            await stream.close()

        async with client:
            await asyncio.gather(*(leave(1 + i) for i in range(8)))
            # Not streamed: the client gives up while it waits.
            with pytest.raises(openai.APITimeoutError):
                await client.completions.create(**endless, timeout=0.2)

    before = time.monotonic()
    asyncio.run(main())
    until_idle(service)
    assert service.engine.cache.used == 0
    assert time.monotonic() - before < 8
    assert service.metrics.cancelled._value.get() >= 9
