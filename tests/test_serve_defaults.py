# SPDX-License-Identifier: Apache-2.0
"""generation_config.json speaks where a request does not, unless a flag is against it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import openai
from hypothesis import given
from hypothesis import strategies as st

from helpers import server
from helpers.server import NAME, quantized_folder, running, tokenizer
from paddle_ccq.errors import CcqError
from paddle_ccq.serve import main
from paddle_ccq.serving.defaults import SamplingDefaults, read_defaults
from paddle_ccq.serving.protocol import CompletionRequest

PROMPT = "Q: 585 - 17 = ?\nA:"
# Every key that such a file of an ERNIE-4.5 model may have.
ERNIE = {
    "do_sample": True,
    "top_p": 0.8,
    "temperature": 0.8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}


def write(folder: Path, **values: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


@contextlib.contextmanager
def serving(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str, **values: Any
) -> Iterator[openai.OpenAI]:
    """A server of the example whose generation_config.json has these values."""
    shutil.copytree(quantized_folder(), folder)
    write(folder, **values)
    with monkeypatch.context() as patch:
        patch.setattr(server, "quantized_folder", lambda: folder)
        with (
            running(*flags) as (base, _),
            openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client,
        ):
            yield client


def text(client: openai.OpenAI, **given: Any) -> str:
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 24, "seed": 7, **given}
    return client.completions.create(**asked).choices[0].text


def test_the_checkpoints_defaults_are_a_requests_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"temperature": 0.7, "top_p": 0.6, "top_k": 5, "repetition_penalty": 1.3}
    own = {"temperature": 0.7, "top_p": 0.6, "presence_penalty": 0.5}
    extra = {"top_k": 5, "repetition_penalty": 1.3}
    neutral = {"top_k": 0, "repetition_penalty": 1.0}
    with running() as (base, _):
        plain = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
        named = text(plain, **own, extra_body=extra)
        unsaid = text(plain)
        greedy = text(plain, temperature=0)
    with serving(tmp_path / "a", monkeypatch, **values, presence_penalty=0.5) as client:
        assert text(client) == named != unsaid
        assert text(client, temperature=None, top_p=None, extra_body={"top_k": None}) == named
        # What a request says goes before, each field by itself.
        said = {"temperature": 1, "top_p": 1, "presence_penalty": 0}
        assert text(client, **said, extra_body=neutral) == unsaid
        said["temperature"] = 0
        assert text(client, **said, extra_body=neutral) == greedy
    for word in ("none", "vllm"):
        flags = ("--generation-config", word)
        with serving(tmp_path / word, monkeypatch, *flags, **values) as client:
            assert text(client) == unsaid


def test_do_sample_false_is_greedy_and_a_limit_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"do_sample": False, "temperature": 0.9, "max_new_tokens": 3}
    with serving(tmp_path / "a", monkeypatch, **given) as client:
        answers = {text(client, seed=seed) for seed in range(5)}
        assert answers == {text(client, temperature=0)}
        assert len({text(client, seed=seed, temperature=1) for seed in range(5)}) > 1
        for ask in (
            lambda **more: client.completions.create(model=NAME, prompt=PROMPT, **more),
            lambda **more: client.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": "hi"}], **more
            ),
        ):
            endless = {"extra_body": {"ignore_eos": True}}
            assert ask(**endless).usage.completion_tokens == 3
            assert ask(**endless, max_tokens=7).usage.completion_tokens == 7


def test_end_tokens_of_the_file_end_answers_whatever_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running() as (base, _):
        plain = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
        greedy = text(plain, temperature=0)
    third = tokenizer().encode(greedy)[2]
    listed = {"eos_token_id": [2, third]}
    for flags in ((), ("--generation-config", "none")):
        with serving(tmp_path / str(len(flags)), monkeypatch, *flags, **listed) as client:
            assert len(tokenizer().encode(text(client, temperature=0))) == 2


def test_the_start_says_which_defaults_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(tmp_path / "a", monkeypatch, **ERNIE, num_beams=4, typical_p=1.0):
        said = capsys.readouterr().out
    assert "generation_config.json: temperature 0.8, top_p 0.8" in said
    assert "generation_config.json: num_beams: no effect" in said and "typical_p" not in said
    with serving(tmp_path / "b", monkeypatch, "--generation-config", "none", **ERNIE):
        assert "generation_config" not in capsys.readouterr().out
    flags = ("--quiet", "--host", "0.0.0.0")
    with serving(tmp_path / "c", monkeypatch, *flags, **ERNIE, num_beams=4) as client:
        assert client.models.list().data
        assert capsys.readouterr() == ("", "")
    with running():
        assert "generation_config" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"temperature": "warm"},
        {"temperature": True},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"top_k": 2.5},
        {"top_k": -2},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"do_sample": "no"},
    ],
)
def test_a_value_that_no_request_could_have_is_one_line(
    tmp_path: Path, values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(quantized_folder(), folder)
    write(folder, **values)
    assert main([str(folder)]) == 2
    error = capsys.readouterr().err
    [name] = values
    assert error.count("\n") == 1 and f"generation_config.json: {name}: " in error
    with pytest.raises(CcqError):
        read_defaults(folder)


def test_files_that_say_nothing(tmp_path: Path) -> None:
    plain = SamplingDefaults()
    assert read_defaults(tmp_path) == (plain, [])
    empty = {"temperature": None, "top_k": -1, "do_sample": None, "stop_strings": None, "x": [1]}
    assert read_defaults(write(tmp_path, **empty)) == (plain, [])
    assert not plain.describe()
    assert read_defaults(write(tmp_path, do_sample=True))[0] == plain
    assert read_defaults(write(tmp_path, **ERNIE))[0].describe() == "temperature 0.8, top_p 0.8"
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(CcqError, match="not a JSON object"):
        read_defaults(tmp_path)


VALUES = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1),
        "top_k": st.integers(0, 100),
        "min_p": st.floats(0, 1),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.1, 3),
    },
)


@given(VALUES, VALUES)
def test_a_request_goes_before_the_file_in_every_field(
    file: dict[str, Any], said: dict[str, Any]
) -> None:
    defaults = SamplingDefaults(**file)
    plain = CompletionRequest(model=NAME, prompt="x")
    request = CompletionRequest(model=NAME, prompt="x", **said)
    params = request.sampling(5, None, defaults)
    wanted = {**vars(plain.sampling(5, None)), **file, **said}
    assert vars(params) == wanted
