# SPDX-License-Identifier: Apache-2.0
"""Task scoring and text reading on stand-in models, and on a small real model where it is there."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from helpers.synthetic import tiny_config, write_checkpoint, write_tokenizer

paddle = pytest.importorskip("paddle")

from paddle_ccq.checkpoint.reader import open_checkpoint  # noqa: E402
from paddle_ccq.errors import CcqError  # noqa: E402
from paddle_ccq.evaluation import tasks  # noqa: E402
from paddle_ccq.evaluation.run import score_tasks, summarize  # noqa: E402
from paddle_ccq.evaluation.text import (  # noqa: E402
    Tokenizer,
    check_same_tokenizer,
    token_stream,
)
from paddle_ccq.models.ernie import Ernie  # noqa: E402
from paddle_ccq.texts.documents import read_documents  # noqa: E402

REAL_MODEL = Path(__file__).parents[1] / "examples" / "ernie-45-moe-3m"


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path)
    return Tokenizer(tmp_path, {})


class Parrot:
    """Continues any prompt that ends in `key` with the text that belongs to it.

    Hidden states are the tokens so far; logits point at the next byte of the first continuation
    whose key occurs last.
    """

    def __init__(self, tokenizer: Tokenizer, replies: dict[str, str]) -> None:
        self.config = SimpleNamespace(max_position_embeddings=200, vocab_size=259)
        self.blocks = []
        self.tokenizer, self.replies = tokenizer, replies

    def hidden_states(self, tokens, padding=None, cache=None):
        tokens = tokens.numpy()
        if cache is not None:
            before = getattr(cache, "seen", None)
            tokens = tokens if before is None else np.concatenate([before, tokens], axis=1)
            cache.seen = tokens
            cache.select = lambda rows: setattr(cache, "seen", cache.seen[rows.numpy()])
        states = np.full((*tokens.shape, 200), -1, np.int64)
        for position in range(tokens.shape[1]):
            states[:, position, : position + 1] = tokens[:, : position + 1]
        new = tokens.shape[1] - (0 if cache is None or before is None else before.shape[1])
        return paddle.to_tensor(states[:, -new:])

    def logits(self, hidden):
        rows = hidden.numpy()
        result = np.zeros((len(rows), 259), np.float32)
        for row, tokens in enumerate(rows):
            text = self.tokenizer.decode(tokens[tokens > 2].tolist())
            key = max(self.replies, key=text.rfind)
            done = text[text.rfind(key) + len(key) :]
            reply = self.replies[key]
            if reply.startswith(done) and len(reply) > len(done):
                result[row, self.tokenizer.encode(reply[len(done)])[0]] = 9.0
        return paddle.to_tensor(result)


def items_of(*records: dict) -> list[tasks.TaskItem]:
    return [
        tasks.TaskItem(r["task"], r["prompt"], r["answer"], tuple(r.get("choices", ())), "f:1")
        for r in records
    ]


def test_scoring_on_a_stand_in(tokenizer):
    model = Parrot(
        tokenizer,
        {
            "1 + 1 =": " 2\nmore",
            "2 + 2 =": " 5\n",
            "What is x?\nA:": " red\n",
            "Q3:": " bluish\n",
            "Sol 1:": " 3 and 4. The answer is 7.\nNext",
            "Sol 2:": " It is 8.\n",
            "Sol 3:": " The answer is -12\n",
            "word?": " cat",
            "which?": " longer one",
        },
    )
    items = items_of(
        {"task": "arith", "prompt": "1 + 1 =", "answer": "2"},
        {"task": "arith", "prompt": "2 + 2 =", "answer": "4"},
        {"task": "choice", "prompt": "word?", "answer": "cat", "choices": ["dog", "cat", "a"]},
        {"task": "recall", "prompt": "What is x?\nA:", "answer": "red"},
        {"task": "recall", "prompt": "Q3:", "answer": "blue"},
        {"task": "word", "prompt": "Sol 1:", "answer": "7"},
        {"task": "word", "prompt": "Sol 2:", "answer": "8"},
        {"task": "word", "prompt": "Sol 3:", "answer": "-12"},
        {"task": "choice", "prompt": "which?", "answer": "no", "choices": ["no", "longer one"]},
    )
    scores = score_tasks({"m": model}, tokenizer, items, threads=2)["m"]
    result = {task: score.correct.tolist() for task, score in scores.items()}
    assert result == {
        "arith": [True, False],
        "choice": [True, False],
        "recall": [True, False],
        "word": [True, False, True],
    }
    summary = summarize(None, {"m": scores}, None)["m"]["tasks"]
    assert summary["arith"] == {
        "items": 2,
        "accuracy": 0.5,
        "accuracy_error": pytest.approx(np.sqrt(0.125)),
    }


def test_answers_in_texts():
    assert tasks.answer_in("arith", " 42 \nQ: next") == "42"
    assert tasks.answer_in("word", " so 4 + 5 = 9. The answer is 9.") == "9"
    assert tasks.answer_in("word", " so 4 + 5 = 9.\nThe answer is 9") == ""
    assert tasks.answer_in("recall", "") == ""


def test_choice_likelihoods_equal_scoring_whole_sequences(tmp_path):
    """Reading a prompt once for all its choices is only a shortcut."""
    write_checkpoint(tmp_path, tiny_config())
    model = Ernie(open_checkpoint(tmp_path))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 259, length).tolist() for length in (5, 12, 9)]
    lengths = ([3, 1], [2, 6, 4], [1])
    choices = [[rng.integers(3, 259, n).tolist() for n in row] for row in lengths]
    ours = tasks.choice_likelihoods(model, prompts, choices)
    for prompt, options, values in zip(prompts, choices, ours, strict=True):
        for option, value in zip(options, values, strict=True):
            tokens = paddle.to_tensor([prompt + option])
            logits = model.logits(model.hidden_states(tokens))[0].numpy().astype(np.float64)
            log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            positions = np.arange(len(prompt) - 1, len(prompt) + len(option) - 1)
            assert value == pytest.approx(log_p[positions, option].mean(), abs=1e-4)


def test_too_long_prompts_name_the_item(tokenizer):
    items = items_of({"task": "arith", "prompt": "x" * 150, "answer": "2"})
    with pytest.raises(CcqError, match=r"f:1: the prompt has 151 tokens and needs 64 more"):
        score_tasks({"m": Parrot(tokenizer, {})}, tokenizer, items)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"prompt": "a"}', 'no field "answer"'),
        ('{"prompt": 3, "answer": "b"}', 'no field "prompt"'),
        ('{"prompt": "a", "answer": "b", "choices": "bc"}', '"choices" must be a list'),
        ('{"prompt": "a", "answer": "b", "choices": ["c"]}', "not one of the choices"),
        ("", "holds no task items"),
    ],
)
def test_bad_task_files(tmp_path, line, message):
    path = tmp_path / "t.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(CcqError, match=message) as caught:
        tasks.read_items(path)
    assert str(path) in str(caught.value)


def test_item_limit_and_default_task_name(tmp_path):
    path = tmp_path / "colours.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n\n' * 5)
    items = tasks.read_items(path, limit=3)
    assert len(items) == 3 and {item.task for item in items} == {"colours"}
    assert items[2].where.endswith("colours.jsonl:5")


def test_stream_frames_each_document(tmp_path, tokenizer):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("ab", "</s>", "é\n")))
    documents = read_documents(path)
    stream = token_stream(documents, tokenizer).tolist()
    assert stream[:4] == [1, *(3 + byte for byte in b"ab"), 2]
    assert stream[4] == 1 and stream[-1] == 2
    assert stream[-4:-1] == [3 + byte for byte in "é\n".encode()]
    text = tmp_path / "t.txt"
    text.write_text("one\ndocument")
    assert read_documents(text) == ["one\ndocument"]
    assert 3 + ord("\n") in tokenizer.newline_tokens()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b'{"txt": "a"}', r't\.jsonl:1: none of the fields "text"'),
        ("t.jsonl", b"\xff\n", "not UTF-8"),
        ("t.txt", b"ab\xff", r"t\.txt:1: not UTF-8: byte 0xff"),
        ("t.txt", b"", "holds no text"),
        ("t.jsonl", b"", "holds no text"),
        ("t.csv", b"a", r"must be a \.jsonl, a \.json or a \.txt file"),
    ],
)
def test_bad_texts(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CcqError, match=message):
        read_documents(tmp_path / name)


def test_tokenizer_errors(tmp_path, tokenizer):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CcqError, match=r"no tokenizer\.json and no tokenizer\.model; put"):
        Tokenizer(empty, {})
    (empty / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CcqError, match=r"tokenizer\.model: (not a usable|reading it needs)"):
        Tokenizer(empty, {})
    (empty / "tokenizer.json").write_text("{}")
    with pytest.raises(CcqError, match="not a usable tokenizer"):
        Tokenizer(empty, {})
    (empty / "tokenizer.json").write_bytes(tokenizer.path.read_bytes())
    with pytest.raises(CcqError, match="names the bos token"):
        Tokenizer(empty, {})
    other = Tokenizer(empty, {"bos_token_id": 1, "eos_token_id": [2, 5]})
    assert (other.bos, other.eos) == (1, 2)
    check_same_tokenizer(tokenizer, other)
    with (empty / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(CcqError, match="cannot be compared"):
        check_same_tokenizer(tokenizer, other)


@pytest.mark.skipif(not REAL_MODEL.is_dir(), reason="the example model is not in this checkout")
def test_the_example_model_can_add():
    """It was trained to; a wrong rotation, mask or routing leaves nothing of that."""
    checkpoint = open_checkpoint(REAL_MODEL)
    tokenizer = Tokenizer(REAL_MODEL, checkpoint.config.raw)
    pairs = np.random.default_rng(0).integers(20, 500, (40, 2)).tolist()
    questions = [{"prompt": f"Q: {a} + {b} = ?\nA:", "answer": str(a + b)} for a, b in pairs]
    items = items_of(*({"task": "arith", **question} for question in questions))
    scores = score_tasks({"m": Ernie(checkpoint)}, tokenizer, items)["m"]["arith"]
    assert scores.correct.mean() > 0.7
