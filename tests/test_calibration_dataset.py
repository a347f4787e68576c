# SPDX-License-Identifier: Apache-2.0
"""Calibration text from a data set of a hub: what is fetched, kept, and refused."""

from __future__ import annotations

import json
import sys
import types

import pytest

from paddle_ccq.calibration import dataset
from paddle_ccq.calibration.dataset import local_text
from paddle_ccq.errors import CcqError
from paddle_ccq.texts.documents import read_documents


@pytest.fixture()
def hub(monkeypatch, tmp_path):
    """A client in place of `datasets`; its calls are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake = types.ModuleType("datasets")
    fake.calls, fake.rows = [], [{"text": "one"}, {"text": " "}, {"text": "two\nlines"}]

    def load_dataset(name, config, *, split, streaming):
        fake.calls.append((name, config, split, streaming))
        if isinstance(fake.rows, Exception):
            raise fake.rows
        return iter(fake.rows)

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_data_set_is_fetched_once_and_kept(hub):
    path = local_text("owner/name:part")
    assert texts(path) == ["one", "two\nlines"]
    assert hub.calls == [("owner/name", "part", "train", True)]
    hub.rows = ConnectionError("no network")
    assert local_text("owner/name:part") == path and len(hub.calls) == 1


def test_a_file_is_never_taken_for_a_data_set(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("text")
    assert str(local_text("owner/name")) == "owner/name"
    assert str(local_text("missing.jsonl")) == "missing.jsonl" and not hub.calls
    assert str(local_text("/no/such/file.txt")) == "/no/such/file.txt" and not hub.calls


def test_a_dry_run_fetches_nothing(hub, tmp_path):
    from paddle_ccq.calibration.session import make_request

    request = make_request("owner/name", None, fetch=False)
    assert request.pending and not hub.calls
    assert not make_request(str(tmp_path / "no.txt"), None, fetch=False).pending


def test_only_as_much_as_is_needed_is_read(hub, monkeypatch):
    monkeypatch.setattr(dataset, "CHARACTERS", 10)
    hub.rows = ({"text": "x" * 4} for _ in iter(int, 1))  # without end
    assert texts(local_text("owner/name")) == ["x" * 4] * 3


def test_the_only_column_of_strings_is_the_text(hub):
    hub.rows = [{"id": 1, "content": "one"}]
    assert texts(local_text("owner/name")) == ["one"]


def test_chats_are_kept_as_chats(hub):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    hub.rows = [{"id": "x", "messages": chat}, {"id": "y", "messages": None}]
    assert read_documents(local_text("owner/chats"))[0].messages == tuple(chat)
    hub.rows = [{"src": ["a"], "tgt": ["b"], "system": None, "label": [1]}]
    assert read_documents(local_text("owner/erniekit"))[0].messages == tuple(chat)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"question": "a", "answer": "b"}], "which column is the text.*question, answer"),
        ([{"text": ""}], "holds no text"),
        ([], "holds no text"),
        ([{"text": "a"}, {"text": "b \ud83d"}], "row 2: half a surrogate pair"),
        ([{"messages": [{"role": "user"}]}], r"row 1: messages\[0\] has no text"),
        (FileNotFoundError("no\nsuch set"), "gives no such data set: no such set$"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_stays(hub, rows, match):
    hub.rows = rows
    with pytest.raises(CcqError, match=match) as raised:
        local_text("owner/name")
    assert str(raised.value).startswith("--calibration owner/name: ")
    assert "\n" not in str(raised.value)
    assert not [p for p in dataset.cache_folder().rglob("*") if p.is_file()]


def test_without_the_client_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CcqError, match=r"no such file; .*paddle-ccq\[datasets\]"):
        local_text("owner/name")
