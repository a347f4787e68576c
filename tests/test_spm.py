# SPDX-License-Identifier: Apache-2.0
"""Folders whose tokenizer is a SentencePiece model: encoded as the library does, and usable."""

from __future__ import annotations

import importlib
import io
import json
import sys
from pathlib import Path

import pytest

from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.errors import CcqError
from paddle_ccq.evaluation.text import Tokenizer, check_same_tokenizer
from paddle_ccq.quantize import quantize

sentencepiece = pytest.importorskip("sentencepiece")

SAMPLE = Path(__file__).parent.parent / "examples" / "data" / "public-domain-sample.txt"
IDS = {"bos_token_id": 1, "eos_token_id": 2}
TEXTS = (
    "A plain sentence.",
    "  two  spaces\nand lines\n",
    "中文 and \U0001f600",
    "",
    " ",
    "a</s",
)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model(request) -> bytes:
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE.read_text("utf-8").splitlines()),
        model_writer=file,
        model_type=request.param,
        vocab_size=500,
        byte_fallback=True,
        character_coverage=0.98,
        user_defined_symbols=["<|turn|>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return file.getvalue()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.model").write_bytes(model)
    return tmp_path / "t"


def settings(folder: Path, **values) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("name", ["tokenizer.model", "spm.model", "ernie_token_100k.model"])
def test_plain_texts_are_encoded_as_the_library_does(folder, model, name):
    (folder / "tokenizer.model").rename(folder / name)
    tokenizer = Tokenizer(folder, {})
    assert tokenizer.path.name == name
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == library.encode(text)
        assert tokenizer.decode(ids) == text


def test_special_tokens_are_cut_out_first(folder, model):
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    turn = library.piece_to_id("<|turn|>")
    size = library.get_piece_size()
    added = {
        str(size): {"content": "<|end|>", "special": True, "rstrip": True},
        str(size + 1): {"content": "<|end|>x", "special": False},
    }
    settings(folder, added_tokens_decoder=added, additional_special_tokens=["<|turn|>"])
    tokenizer = Tokenizer(folder, IDS)
    ids = tokenizer.encode("<s>one<|turn|>two<|end|>  three<|end|>x</s>")
    expected = [1, *library.encode("one"), turn, *library.encode("two"), size]
    assert ids == [*expected, *library.encode("three"), size + 1, 2]
    # The pieces around a token that is left out are decoded as one text, each with its space.
    assert tokenizer.decode(ids) == "one two three<|end|>x"
    whole = tokenizer.fast.decode(ids, skip_special_tokens=False)
    assert whole == "<s>one<|turn|>two<|end|>three<|end|>x</s>"
    assert tokenizer.fast.token_to_id("<|end|>") == size
    assert tokenizer.fast.id_to_token(size) == "<|end|>"
    assert tokenizer.fast.id_to_token(size + 2) is None
    assert tokenizer.fast.get_vocab_size() == size + 2


def test_where_tokens_begin(folder):
    text = "<s>one \U0001f600<|turn|>\u4e2d two"
    tokenizer = Tokenizer(folder, IDS)
    encoding = tokenizer.fast.encode(text)
    assert len(encoding.offsets) == len(encoding.ids)
    starts = [start for start, _ in encoding.offsets]
    assert starts == sorted(starts) and encoding.offsets[0] == (0, 3)
    ends = [end for _, end in encoding.offsets]
    assert ends[-1] == len(text)
    turn = text.index("<|turn|>")
    assert (turn, turn + 8) in encoding.offsets
    for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        piece = tokenizer.fast.id_to_token(number).replace("\u2581", " ")
        if not piece.startswith("<0x"):
            assert piece.strip() == text[start:end].strip()
        else:
            assert text[start : start + 1] in "\U0001f600\u4e2d"


def test_the_bytes_of_single_tokens(folder):
    from paddle_ccq.serving.token_text import TokenText

    tokenizer = Tokenizer(folder, IDS)
    texts = TokenText(tokenizer)
    ids = tokenizer.encode("one \U0001f600 two")
    assert b"".join(map(texts.bytes, ids)).strip() == "one \U0001f600 two".encode()
    assert texts.bytes(1) == b"<s>"
    assert texts.bytes(100_000) == b""


def test_ids_outside_the_vocabulary_have_no_text(folder):
    tokenizer = Tokenizer(folder, IDS)
    assert tokenizer.decode([*tokenizer.encode("one"), 100_000, -1]) == "one"
    assert tokenizer.fast.decode([100_000]) == ""


def test_newlines_and_half_characters(folder):
    tokenizer = Tokenizer(folder, IDS)
    found = tokenizer.newline_tokens()
    assert any(token in found for token in tokenizer.encode("a\nb"))
    assert not any(token in found for token in tokenizer.encode("a b"))
    ids = tokenizer.encode("\U0001f600")
    assert tokenizer.decode(ids) == "\U0001f600"
    assert "\ufffd" in tokenizer.decode(ids[:-1])


def test_tokenizer_json_goes_first(folder):
    write_checkpoint(folder, tiny_config())
    assert Tokenizer(folder, IDS).path.name == "tokenizer.json"


def test_two_models_can_be_compared(folder, tmp_path):
    a = Tokenizer(folder, IDS)
    check_same_tokenizer(a, Tokenizer(folder, IDS))
    (folder / "spm.model").write_bytes(b"")
    other = tmp_path / "other"
    write_checkpoint(other, tiny_config())
    with pytest.raises(CcqError, match="cannot be compared"):
        check_same_tokenizer(a, Tokenizer(other, IDS))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a usable SentencePiece model"),
        (b"\x00spm", "not a usable SentencePiece model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_what_is_no_model(folder, data, message):
    (folder / "tokenizer.model").write_bytes(data)
    with pytest.raises(CcqError, match=rf"tokenizer\.model: .*{message}"):
        Tokenizer(folder, IDS)


def test_contradicting_ids(folder):
    settings(folder, added_tokens_decoder={"7": {"content": "<s>"}})
    with pytest.raises(CcqError, match=r"tokenizer_config\.json: gives '<s>' the id 7"):
        Tokenizer(folder, IDS)
    settings(folder, added_tokens_decoder={"x": {"content": "<s>"}})
    with pytest.raises(CcqError, match="added_tokens_decoder"):
        Tokenizer(folder, IDS)
    settings(folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": "x"}))
    with pytest.raises(CcqError, match=r"added_tokens\.json: '<new>'"):
        Tokenizer(folder, IDS)


def test_the_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(CcqError, match=r"pip install 'paddle-ccq\[eval\]'"):
        Tokenizer(folder, IDS)


@pytest.fixture
def checkpoint(folder, model) -> Path:
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    config = tiny_config(num_hidden_layers=2, moe_num_experts=2, vocab_size=-(-size // 64) * 64)
    write_checkpoint(folder, config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


def test_calibration_evaluation_and_server(checkpoint, tmp_path, capsys):
    pytest.importorskip("paddle")
    pytest.importorskip("fastapi")
    text = tmp_path / "text.txt"
    text.write_text(SAMPLE.read_text("utf-8")[:4000], "utf-8")
    out = tmp_path / "out"
    quantize(checkpoint, out, preset="fast", calibration=text, calibration_tokens=512)
    assert "no tokenizer" not in capsys.readouterr().err
    assert (out / "tokenizer.model").read_bytes() == (checkpoint / "tokenizer.model").read_bytes()
    evaluate = importlib.import_module("paddle_ccq.evaluate").evaluate
    found = evaluate(out, checkpoint, text=text, window=64, max_tokens=256)
    assert found["text"]["used_tokens"] == 256

    from fastapi.testclient import TestClient

    from paddle_ccq.serve import build_parser, build_service
    from paddle_ccq.serving.app import create_app

    service = build_service(build_parser().parse_args([str(out), "--served-model-name", "m"]))
    service.load()
    try:
        client = TestClient(create_app(service))
        asked = {"model": "m", "prompt": "one two", "max_tokens": 4, "temperature": 0}
        answer = client.post("/v1/completions", json=asked)
        assert answer.status_code == 200, answer.text
        prompt = [service.tokenizer.bos, *service.tokenizer.encode("one two")]
        assert answer.json()["usage"]["prompt_tokens"] == len(prompt)
        assert isinstance(answer.json()["choices"][0]["text"], str)
        asked |= {"echo": True, "logprobs": 1}
        answer = client.post("/v1/completions", json=asked)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        assert choice["text"].startswith("one two")
        offsets = choice["logprobs"]["text_offset"]
        assert offsets == sorted(offsets) and len(offsets) == len(prompt) + 4
    finally:
        service.drain()
