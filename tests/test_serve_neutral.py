# SPDX-License-Identifier: Apache-2.0
"""What the API returned is accepted back, and a field that asks for nothing changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import httpx
import openai
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionAssistantMessageParam, completion_create_params
from openai.types.completion_create_params import CompletionCreateParamsBase

from helpers.server import NAME, running
from paddle_ccq.serving.neutral import _NEUTRAL
from paddle_ccq.serving.protocol import ChatRequest, CompletionRequest

USER = {"role": "user", "content": "Name a color."}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODIES = {
    CHAT: {"model": NAME, "messages": [USER], "max_tokens": 5, "temperature": 0},
    COMPLETIONS: {"model": NAME, "prompt": "Name a", "max_tokens": 5, "temperature": 0},
}
FORMS = {CHAT: ChatRequest, COMPLETIONS: CompletionRequest}
TYPES = {
    CHAT: completion_create_params.CompletionCreateParamsBase,
    COMPLETIONS: CompletionCreateParamsBase,
}
NOTHING = [
    *((name, value) for name, values in _NEUTRAL.items() for value in values),
    ("tools", []),
    ("tool_choice", "none"),
    ("response_format", {"type": "text"}),
    ("logit_bias", {}),
    ("suffix", ""),
    ("n", 1),
    ("best_of", 1),
    ("min_tokens", 0),
    ("min_p", 0),
    ("top_k", 0),
    ("top_k", -1),
    ("presence_penalty", 0),
    ("frequency_penalty", 0.0),
    ("repetition_penalty", 1.0),
    ("repetition_penalty", 1),
    ("length_penalty", 1.0),
    ("stop", []),
    ("stop", ""),
    ("stop_token_ids", []),
    ("logprobs", False),
    ("echo", False),
    ("ignore_eos", False),
    ("stream", False),
    ("stream_options", {}),
    ("stream_options", {"include_usage": None, "include_obfuscation": None}),
    ("stream_options", {"include_usage": False, "include_obfuscation": False}),
    ("user", "me"),
    ("metadata", {}),
    ("metadata", {"a": "b"}),
    ("store", False),
    ("service_tier", "auto"),
    ("service_tier", "default"),
    ("safety_identifier", "x"),
    ("prompt_cache_key", "x"),
]


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with running("--max-num-seqs", "4") as (found, _):
        yield found


@pytest.fixture(scope="module")
def http(base: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def client(base: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client:
        yield client


def said(answer: httpx.Response) -> list[Any]:
    assert answer.status_code == 200, answer.text
    return [(c.get("text"), c.get("message"), c["logprobs"]) for c in answer.json()["choices"]]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_asks_for_nothing_changes_nothing(http: httpx.Client, path: str) -> None:
    plain = said(http.post(path, json=BODIES[path]))
    for name, value in NOTHING:
        assert said(http.post(path, json={**BODIES[path], name: value})) == plain, (name, value)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_every_field_of_the_openai_package_may_be_null(http: httpx.Client, path: str) -> None:
    names = {*get_type_hints(TYPES[path], include_extras=True), *FORMS[path].model_fields}
    optional = sorted(names - {"model", "messages", "prompt", "max_tokens", "temperature"})
    assert {"logit_bias", "stream_options"} < set(optional)
    plain = said(http.post(path, json=BODIES[path]))
    for name in optional:
        assert said(http.post(path, json={**BODIES[path], name: None})) == plain, name
    assert said(http.post(path, json={**BODIES[path], **dict.fromkeys(optional)})) == plain
    # Fields of other servers as well, and those that are there always.
    every = {**BODIES[path], "max_tokens": None, "temperature": None, "of_another_server": None}
    assert http.post(path, json=every).status_code == 200


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(range(len(NOTHING))), max_size=12), st.sampled_from([*FORMS]))
def test_any_mixture_of_them_is_one_request(chosen: list[int], path: str) -> None:
    plain = FORMS[path].model_validate(BODIES[path])
    mixed = FORMS[path].model_validate({**BODIES[path], **dict(NOTHING[i] for i in chosen)})
    assert mixed.sampling(5, None) == plain.sampling(5, None)
    assert mixed.wanted_logprobs() is None and not mixed.stream and (mixed.n or 1) == 1


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_top_logprobs_best_of_and_n_that_agree(http: httpx.Client, path: str) -> None:
    two = {**BODIES[path], "n": 2, "best_of": 2}
    assert len(said(http.post(path, json=two))) == 2
    if path == CHAT:
        for more in ({"top_logprobs": 0}, {"top_logprobs": 0, "logprobs": False}):
            assert said(http.post(path, json={**BODIES[path], **more}))[0][2] is None


@pytest.mark.parametrize(
    "name,value",
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("logit_bias", {"5": 1}),
        ("suffix", "x"),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x", "format": "wav"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("guided_json", {}),
        ("guided_choice", ["a"]),
        ("use_beam_search", True),
        ("early_stopping", True),
        ("length_penalty", 0.5),
        ("length_penalty", True),
        ("skip_special_tokens", False),
        ("include_stop_str_in_output", True),
        ("add_generation_prompt", False),
        ("add_generation_prompt", 1),
        ("continue_final_message", True),
        ("chat_template", "{{ messages }}"),
        ("chat_template_kwargs", {"enable_thinking": True}),
        ("bad_words", ["x"]),
        ("best_of", 2),
        ("return_token_ids", True),
        ("no_such_field", 0),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_asks_for_something_else_is_refused(
    http: httpx.Client, path: str, name: str, value: Any
) -> None:
    answer = http.post(path, json={**BODIES[path], name: value})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == name and error["message"].startswith(name)


@pytest.mark.parametrize("options", [{"include_obfuscation": True}, {"other": 1}])
def test_stream_options_that_do_something(http: httpx.Client, options: dict[str, Any]) -> None:
    body = {**BODIES[CHAT], "stream": True, "stream_options": options}
    error = http.post(CHAT, json=body).json()["error"]
    assert error["param"] == "stream_options" and next(iter(options)) in error["message"]


def test_an_answer_of_the_openai_package_goes_back_into_a_conversation(
    client: openai.OpenAI,
) -> None:
    first = client.chat.completions.create(**BODIES[CHAT])
    message = first.choices[0].message
    forms = [
        message,
        message.model_dump(),
        message.model_dump(exclude_none=True),
        message.model_dump(exclude_unset=True),
        message.to_dict(),
        {"role": "assistant", "content": message.content},
    ]
    with client.chat.completions.stream(**BODIES[CHAT]) as stream:
        for _ in stream:
            pass
        parsed = stream.current_completion_snapshot.choices[0].message
    assert parsed.content == message.content
    forms += [parsed, parsed.model_dump(), parsed.to_dict()]
    answers = {
        client.chat.completions.create(
            **{**BODIES[CHAT], "messages": [USER, form, USER]}, logprobs=True
        )
        .choices[0]
        .model_dump_json()
        for form in forms
    }
    assert len(answers) == 1


def test_every_field_of_an_answers_message_may_come_back_empty(http: httpx.Client) -> None:
    fields = set(get_type_hints(ChatCompletionAssistantMessageParam, include_extras=True))
    empty = {name: None for name in fields - {"role", "content"}}
    said_before = {"role": "assistant", "content": "Red."}
    plain = said(http.post(CHAT, json={**BODIES[CHAT], "messages": [USER, said_before, USER]}))
    for more in (
        empty,
        {"annotations": [], "tool_calls": []},
        {"reasoning_content": None, "reasoning": "", "parsed": None},
        {"reasoning_content": "", "name": None},
        {"reasoning_content": "I thought of it."},  # the plain template does not show it
        {"content": [{"type": "text", "text": "Red.", "annotations": None}]},
    ):
        messages = [USER, {**said_before, **more}, USER]
        answer = http.post(CHAT, json={**BODIES[CHAT], "messages": messages})
        assert said(answer) == plain, more
    for content in ({"content": None}, {"content": ""}, {}):
        messages = [USER, {"role": "assistant", **content}, USER]
        assert http.post(CHAT, json={**BODIES[CHAT], "messages": messages}).status_code == 200


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "assistant", "content": "x", "tool_calls": [{"id": "1", "type": "function"}]},
        {"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": ""}},
        {"role": "assistant", "content": "x", "audio": {"id": "1"}},
        {"role": "user", "content": None},
        {"role": "user"},
        {"role": "user", "content": "x", "reasoning_content": "y"},
        {"role": "user", "content": "x", "other": 1},
    ],
)
def test_messages_with_what_the_model_would_not_see(
    http: httpx.Client, message: dict[str, Any]
) -> None:
    answer = http.post(CHAT, json={**BODIES[CHAT], "messages": [USER, message]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"


def test_reasoning_content_reaches_the_template() -> None:
    thought = {"role": "assistant", "content": "Red.", "reasoning_content": "R"}
    request = ChatRequest.model_validate({**BODIES[CHAT], "messages": [USER, thought]})
    assert request.messages[1].plain() == thought


def test_types_of_the_openai_package_are_looked_at() -> None:
    """The property above would hold of nothing if the package hid its fields."""
    for form in TYPES.values():
        assert get_args(get_type_hints(form)["temperature"])
