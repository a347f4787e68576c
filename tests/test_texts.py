# SPDX-License-Identifier: Apache-2.0
"""Texts as users have them: packed, piped, in arrays and chats; what is refused, and how."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.errors import CcqError
from paddle_ccq.evaluation.text import Tokenizer, token_stream
from paddle_ccq.texts.documents import Chat, read_documents, read_texts
from paddle_ccq.texts.files import read_file
from paddle_ccq.texts.records import read_objects

LINES = b'{"text": "one"}\n\n{"text": "two\\nlines"}\n'
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write(path: Path, data: bytes | str | list | dict) -> Path:
    if not isinstance(data, bytes):
        data = (data if isinstance(data, str) else json.dumps(data)).encode()
    path.write_bytes(data)
    return path


class Pipe:
    """A named pipe that somebody writes into once."""

    def __init__(self, path: Path, data: bytes) -> None:
        os.mkfifo(path)
        self.path = path
        self._thread = threading.Thread(target=lambda: path.write_bytes(data), daemon=True)
        self._thread.start()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("t.jsonl", LINES),
        ("t.JSONL", LINES),
        ("t.ndjson", LINES),
        ("t.jsonl", b"\xef\xbb\xbf" + LINES),
        ("t.jsonl", b'{"text": "one"}\n\xef\xbb\xbf{"text": "two\\nlines"}\n'),  # cat a b
        ("t.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("t.jsonl", LINES.rstrip()),
        ("t.jsonl", LINES.decode().encode("utf-16")),
        ("t.jsonl", b"\xfe\xff" + LINES.decode().encode("utf-16-be")),
        ("t.jsonl", LINES.decode().encode("utf-32")),
        ("t.jsonl.gz", gzip.compress(LINES)),
        ("t.jsonl.gz", gzip.compress(LINES[:16]) + gzip.compress(LINES[16:])),
        ("t.jsonl.bz2", bz2.compress(LINES)),
        ("t.jsonl.xz", lzma.compress(LINES)),
        ("t.jsonl", gzip.compress(LINES)),  # a browser keeps the name
        ("t.json", LINES),
        ("t.json", b'[{"text": "one"},\n {"content": "two\\nlines"}]'),
        ("t.jsonl", b'\n[\n"one", {"text": "two\\nlines"}]\n'),
        ("t.jsonl", b'{"text": "one"}\n{"text": " \\u200b"}\n"two\\nlines"\n{"text": ""}'),
        ("t.jsonl", b'{"text": null, "content": "one"}\n{"content": "two\\nlines", "x": [1]}'),
    ],
)
def test_the_same_documents_come_out_of_every_form(tmp_path, name, data) -> None:
    assert read_documents(write(tmp_path / name, data)) == ["one", "two\nlines"]


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("t.txt", "a\r\nb\rc", "a\nb\nc"),
        ("t.txt", "\ufeffé\n", "é\n"),
        ("t.txt.gz", gzip.compress("é\x85\u2028x".encode()), "é\x85\u2028x"),
        ("t.txt", "{is no JSON", "{is no JSON"),
        ("t.txt", "BZh is a word, too", "BZh is a word, too"),
        ("t.json", '{\n  "text": "one\\r\\nline"\n}\n', "one\r\nline"),
        ("t.jsonl", '{"text": "\\ud83d\\ude00"}', "\N{GRINNING FACE}"),
    ],
)
def test_one_document(tmp_path, name, data, text) -> None:
    assert read_documents(write(tmp_path / name, data)) == [text]


@pytest.mark.parametrize(
    ("data", "documents"),
    [
        (LINES, ["one", "two\nlines"]),
        (gzip.compress(LINES), ["one", "two\nlines"]),
        (b' [\n{"text": "one"}]', ["one"]),
        (b"[Chapter 1]\nOnce ...", ["[Chapter 1]\nOnce ..."]),
        (b"plain", ["plain"]),
    ],
)
def test_a_pipe_without_a_name_is_known_by_what_comes_out(tmp_path, data, documents) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, data)
    os.close(write_end)
    try:
        found = read_texts(f"/dev/fd/{read_end}")
    finally:
        os.close(read_end)
    assert list(found.documents) == documents and found.label == "pipe"
    named = Pipe(tmp_path / "p.jsonl", LINES)
    assert read_documents(named.path) == ["one", "two\nlines"]


def test_standard_input(monkeypatch) -> None:
    stdin = SimpleNamespace(buffer=io.BytesIO(LINES), closed=False, isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", stdin)
    found = read_texts("-")
    assert found.documents == ("one", "two\nlines") and found.label == "standard input"
    stdin.isatty = lambda: True
    with pytest.raises(CcqError, match="--text -: nothing comes in"):
        read_texts("-")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(CcqError, match="--tasks -: nothing comes in"):
        read_texts("-", "--tasks")


SURROGATE = r"half a surrogate pair, \\ud83d, at character 3"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.jsonl", '{"text": "ok"}\n{"text": "a \\ud83d b"}', f"t.jsonl:2: {SURROGATE}"),
        ("t.jsonl", '{"content": "a \\ud83d b"}', f"t.jsonl:1: {SURROGATE}"),
        ("t.jsonl", '["a \\ud83d b"]', f"t.jsonl:1: {SURROGATE}"),
        (
            "t.jsonl",
            '{"messages": [{"role": "user", "content": "a \\ud83d b"}]}',
            f"t.jsonl:1: {SURROGATE}",
        ),
        ("t.jsonl", '{"src": "a \\ud83d b", "tgt": "x"}', f"t.jsonl:1: {SURROGATE}"),
        ("t.txt", "", "holds no text"),
        ("t.txt", " \n\t\u3000\u200b\ufeff\n", "holds no text"),
        ("t.jsonl", "\n\n", "holds no text"),
        ("t.jsonl", '{"text": " "}\n{"text": "\\n"}', "holds no text"),
        ("t.json", "[]", "holds no text"),
        ("t.jsonl", '{"messages": [{"role": "user", "content": " "}]}', "holds no text"),
        ("t.jsonl.gz", gzip.compress(b""), "holds no text"),
        ("t.jsonl.gz", LINES, r"named \.gz, but it holds no gzip data"),
        ("t.jsonl.gz", gzip.compress(LINES)[:-9], "broken gzip data"),
        ("t.jsonl.bz2", bz2.compress(LINES)[:-9], "broken bzip2 data"),
        ("t.jsonl.xz", lzma.compress(LINES)[:-9], "broken xz data"),
        ("t.jsonl", '{"text": "a"}\n{"text": "b"', r"t\.jsonl:2: not JSON"),
        ("t.jsonl", '{"text": "a"}\n{"text": "b"} {"text": "c"}', r"t\.jsonl:2: not JSON"),
        ("t.jsonl", '{"text": "a"}\n' + "[" * 100_000, r"t\.jsonl:2: not JSON"),
        ("t.jsonl", "9" * 5000, r"t\.jsonl:1: not JSON"),
        (
            "t.json",
            '[{"text": "a"},\n{"text": "b"}\n{"text": "c"}]',
            r"t\.json:3: .*without a comma",
        ),
        ("t.json", '[{"text": "a"},\n{"text": b}]', r"t\.json:2: not JSON"),
        ("t.json", '[{"text": "a"},\n]', r"t\.json:2: not JSON"),
        ("t.json", '[{"text": "a"}', r"t\.json:1: not JSON"),
        ("t.json", '[{"text": "a"}]\nx', r"t\.json:2: something follows"),
        ("t.json", '{\n"text": "a"}\n{"text": "b"}', r"t\.json:3: something follows"),
        ("t.jsonl", '{"text": "a"}\n7', r"t\.jsonl:2: not a JSON object or string"),
        ("t.jsonl", '{"text": ["a"]}', r't\.jsonl:1: field "text" is not a string'),
        ("t.jsonl", '{"prompt": "a"}', r't\.jsonl:1: none of the fields "text"'),
        ("t.jsonl", '{"messages": []}', r't\.jsonl:1: field "messages"'),
        ("t.jsonl", '{"messages": [{"content": "a"}]}', r"t\.jsonl:1: messages\[0\]"),
        ("t.jsonl", '{"messages": [{"role": "user"}]}', r"t\.jsonl:1: messages\[0\] has no text"),
        (
            "t.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            r"t\.jsonl:1: messages\[0\] has a part that is not text",
        ),
        ("t.jsonl", '{"src": "a"}', r't\.jsonl:1: field "tgt"'),
        ("t.jsonl", '{"src": ["a", "b"], "tgt": ["c"]}', r't\.jsonl:1: "src" has 2 turns'),
        ("t.jsonl", '{"src": ["a", 1], "tgt": ["c", "d"]}', r't\.jsonl:1: field "src"'),
        ("t.jsonl", '{"src": "a", "tgt": "b", "is_system": 1}', r"t\.jsonl:1: .*is_system"),
        ("t.jsonl", b'{"text": "a"}\n\n{"text": "\xff"}', r"t\.jsonl:3: not UTF-8: byte 0xff"),
        ("t.txt", "a\nb".encode("utf-16-le"), r"t\.txt:1: holds a NUL"),
        ("t.txt", b"\xff\xfea\0\n\0b", r"t\.txt:2: not UTF-16"),
        ("t.jsonl", '{"text": "a"}\n{"a": ' + "9" * 5000 + "}", r"t\.jsonl:2: .*too many digits"),
        ("t.json", '\n{"a":\n ' + "9" * 5000 + "}", r"t\.json:\d: .*too many digits"),
        ("t.jsonl", '{"a": ' + "[" * 100_000, r"t\.jsonl:1: .*nested too deeply"),
        ("t.jsonl", b"PAR1\x15\x04", "is Parquet"),
        ("t.parquet", b"PAR1\x15\x04", "is Parquet"),
        ("t.txt", b"PK\x03\x04", "is a zip archive"),
        ("t.jsonl.gz", gzip.compress(b"a" + b"\0" * 256 + b"ustar\0"), "is a tar archive"),
        ("t.csv", b"a,b", r"must be a \.jsonl, a \.json or a \.txt"),
        ("text", b"a", r"must be a \.jsonl, a \.json or a \.txt"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, name, data, message) -> None:
    path = write(tmp_path / name, data)
    with pytest.raises(CcqError, match=message) as raised:
        read_documents(path, "--calibration")
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_what_is_no_file(tmp_path) -> None:
    for path, message in (
        ("", "--text: the name is empty"),
        (" ", "--text: the name is empty"),
        (tmp_path, "is a folder"),
        (tmp_path / "no.jsonl", "no such file"),
        (write(tmp_path / "a.txt", b"a") / "b.txt", "no such file"),
        ("/dev/null", "neither a file nor a pipe"),
    ):
        with pytest.raises(CcqError, match=message):
            read_documents(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts") / "model"
    write_checkpoint(folder, tiny_config(num_hidden_layers=2, moe_num_experts=2, moe_k=1))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "chat_template": CHAT_TEMPLATE}))
    return folder


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"messages": [USER, ASSISTANT]}, "<user>Hi<assistant>Yes?"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
            "<user>Hi",
        ),
        ({"src": "Hi", "tgt": "Yes?"}, "<user>Hi<assistant>Yes?"),
        ({"src": ["Hi"], "tgt": ["Yes?"], "label": [1]}, "<user>Hi<assistant>Yes?"),
        (
            {"system": "S", "src": ["a", "b"], "tgt": ["c", "d"]},
            "<system>S<user>a<assistant>c<user>b<assistant>d",
        ),
    ],
)
def test_chats_are_rendered_by_the_models_template(model, tmp_path, record, text) -> None:
    path = write(tmp_path / "chats.jsonl", json.dumps(record) + '\n{"text": "x"}\n')
    tokenizer = Tokenizer(model, open_checkpoint(model).config.raw)
    documents = read_documents(path)
    assert isinstance(documents[0], Chat)
    # The template's own begin token is not written twice; nothing is begun at the end.
    wanted = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
    wanted += [tokenizer.bos, *tokenizer.encode("x"), tokenizer.eos]
    assert token_stream(documents, tokenizer).tolist() == wanted


def test_a_chat_that_the_template_refuses_is_named_by_its_line(model, tmp_path) -> None:
    tool = {"messages": [USER, {"role": "tool", "content": "4"}]}
    path = write(tmp_path / "t.jsonl", json.dumps({"messages": [USER]}) + "\n" + json.dumps(tool))
    tokenizer = Tokenizer(model, open_checkpoint(model).config.raw)
    with pytest.raises(CcqError, match=r"t\.jsonl:2: .*no tools here"):
        token_stream(read_documents(path), tokenizer)


def test_without_jinja_chats_say_what_is_missing(model, tmp_path, monkeypatch) -> None:
    path = write(tmp_path / "t.jsonl", json.dumps({"messages": [USER]}))
    monkeypatch.setitem(sys.modules, "paddle_ccq.texts.chat_template", None)
    tokenizer = Tokenizer(model, open_checkpoint(model).config.raw)
    with pytest.raises(CcqError, match=r"t\.jsonl:1: .*paddle-ccq\[eval\]"):
        token_stream(read_documents(path), tokenizer)


def test_task_items_come_in_the_same_forms(tmp_path) -> None:
    item = {"prompt": "p", "answer": "a"}
    for name, data in (
        ("t.jsonl.gz", gzip.compress(json.dumps(item).encode())),
        ("t.json", json.dumps([item], indent=1).encode()),
        ("t.jsonl", json.dumps(item).encode("utf-8-sig")),
    ):
        assert [r for _, r in read_objects(write(tmp_path / name, data), "--tasks")] == [item]
    with pytest.raises(CcqError, match=r"t\.txt: must hold JSON objects"):
        list(read_objects(write(tmp_path / "t.txt", b"a"), "--tasks"))
    with pytest.raises(CcqError, match=r"t\.jsonl:2: not a JSON object"):
        list(read_objects(write(tmp_path / "t.jsonl", b'{}\n"a"'), "--tasks"))


ANY_TEXT = (
    st.text(min_size=1)
    .map(lambda text: "x" + text)
    .filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ANY_TEXT, min_size=1, max_size=5), st.booleans(), st.sampled_from([None, 1]))
def test_any_text_survives_every_way_to_write_it(tmp_path_factory, texts, ascii, indent) -> None:
    folder = tmp_path_factory.mktemp("any")
    records = [{"text": text} for text in texts]
    lines = "".join(json.dumps(record, ensure_ascii=ascii) + "\n" for record in records)
    array = json.dumps(records, ensure_ascii=ascii, indent=indent)
    for name, data in (("t.jsonl", lines), ("t.json", array)):
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            path = write(folder / name, data.encode(encoding))
            assert read_documents(path) == texts


@pytest.mark.parametrize("place", ["/dev/fd/{}", "/proc/self/fd/{}", "/proc/{pid}/fd/{}"])
def test_a_pipe_whose_writer_has_gone_is_read_and_not_waited_for(tmp_path, place) -> None:
    pipe = tmp_path / "text.jsonl"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    try:
        pipe.write_text('{"text": "all of it"}\n')  # the writer opens, writes, and closes
        found = read_file(place.format(reader, pid=os.getpid()))
    finally:
        os.close(reader)
    assert found.label == "pipe" and found.text == '{"text": "all of it"}\n'
