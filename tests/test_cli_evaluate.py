# SPDX-License-Identifier: Apache-2.0
"""The evaluate command from outside: results, files, and one-line errors."""

from __future__ import annotations

import importlib
import json
import shutil
import sys

import numpy as np
import pytest

from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.errors import CcqError
from paddle_ccq.evaluate import EvaluateOptions
from paddle_ccq.models.weights import READINGS, weight_source
from paddle_ccq.quantize import quantize

pytest.importorskip("paddle")

# Not "from paddle_ccq import evaluate": that may become the function of the same name.
command = importlib.import_module("paddle_ccq.evaluate")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    config = tiny_config(hidden_size=64, num_hidden_layers=2)
    write_checkpoint(folder / "model", config)
    write_checkpoint(folder / "other", config, layout="paddle", seed=1)
    texts = [f"document {i} holds some words and the number {i * i}" for i in range(30)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(lines)
    items = [
        {"task": "arith", "prompt": "1 + 1 =", "answer": "2"},
        {"task": "cont", "prompt": "a b", "answer": "c", "choices": ["c", "d e"]},
    ]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items * 2))
    return folder


def run(files, *arguments) -> int:
    return command.main([str(a).replace("@", f"{files}/") for a in arguments])


def test_all_of_it(files, tmp_path, capsys):
    output = tmp_path / "result.json"
    code = run(
        files,
        "@model",
        "--reference",
        "@other",
        "--text",
        "@text.jsonl",
        "--tasks",
        "@tasks.jsonl",
        "--window",
        64,
        "--max_tokens",
        640,
        "--max_items",
        3,
        "--threads",
        1,
        "--json",
        output,
    )
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "10 windows of 64 tokens" in shown.out and "perplexity" in shown.out
    result = json.loads(output.read_text())
    assert list(result["models"]) == ["model", "reference"]
    assert result["models"]["reference"]["layout"] == "paddle"
    assert result["text"]["windows"] == 10 and result["text"]["used_tokens"] == 640
    ours, theirs = result["results"]["model"], result["results"]["reference"]
    assert ours["text"]["kl_mean"] > 0.1 and "kl_mean" not in theirs["text"]
    difference = ours["text"]["nll"] - theirs["text"]["nll"]
    assert ours["text"]["nll_over_reference"] == pytest.approx(difference)
    assert ours["tasks"]["arith"]["items"] == 2 and ours["tasks"]["cont"]["items"] == 1

    before = output.read_bytes()
    again = (files, "@model", "--text", "@text.jsonl", "--window", 64, "--json", output)
    assert run(*again) == 2
    assert "already exists" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert run(*again, "--force") == 0
    assert output.read_bytes() != before


def test_same_weights_in_both_layouts_measure_the_same(files, tmp_path):
    config = tiny_config(hidden_size=64, num_hidden_layers=2)
    write_checkpoint(tmp_path / "copy", config, layout="paddle")
    result = command.evaluate(
        files / "model", tmp_path / "copy", files / "text.jsonl", window=64, log=lambda _: None
    )
    assert result["results"]["model"]["text"]["kl_mean"] == 0


def test_packed_weights_are_read_exactly_unless_asked_otherwise(files, tmp_path):
    write_checkpoint(tmp_path / "float", tiny_config(num_hidden_layers=2))
    quantize(tmp_path / "float", tmp_path / "packed", preset="fast", quiet=True)
    checkpoint = open_checkpoint(tmp_path / "packed")
    names = [n for n in checkpoint.names() if checkpoint.format_of(n) != "bf16"]
    assert {checkpoint.format_of(n) for n in names} == {"wint2", "wint8"}
    for name in names:
        exact, rounded = (weight_source(checkpoint, r).read(name) for r in READINGS)
        # WINT2's bfloat16 kernels round twice, by 2^-8 at most each time.
        np.testing.assert_allclose(rounded, exact, rtol=2**-7)
        assert (exact != rounded).mean() > 0.1

    def measure(**options):
        return command.evaluate(
            tmp_path / "packed", text=files / "text.jsonl", window=64, log=lambda _: None, **options
        )

    plain, exact, rounded = measure(), measure(weights="exact"), measure(weights="bfloat16")
    assert [r["weights"] for r in (plain, exact, rounded)] == ["exact", "exact", "bfloat16"]
    assert plain["results"] == exact["results"] != rounded["results"]
    with pytest.raises(CcqError, match="--weights float64"):
        measure(weights="float64")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["@model"], "nothing to measure"),
        (["@nowhere/model", "--text", "@text.jsonl"], "nowhere"),
        (["@model", "--text", "@no.jsonl"], "no.jsonl: no such file"),
        (["@model", "--text", "@text.jsonl", "--window", "1"], "--window 1"),
        (["@model", "--text", "@text.jsonl", "--window", "512"], "max_position_embeddings"),
        (["@model", "--text", "@text.jsonl", "--max-tokens", "5"], "less than one window"),
        (["@model", "--text", "@text.jsonl", "--max-tokens", "much"], "--max-tokens much: not a"),
        (["@model", "--text", "@text.jsonl", "--threads", "0"], "--threads 0"),
        (["@model", "--text", "@text.jsonl", "--json", "@no/out.json"], "does not exist"),
        (["@model", "--text", "@text.jsonl", "--json", "@model"], "is a folder"),
        (["@model", "--tasks", "@text.jsonl"], 'text.jsonl:1: no field "prompt"'),
    ],
)
def test_errors_are_one_line(files, capsys, arguments, message):
    assert run(files, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and message in error[-1]
    assert not any("Traceback" in line for line in error)


def test_different_tokenizers_are_refused(files, tmp_path, capsys):
    shutil.copytree(files / "other", tmp_path / "other")
    tokenizer = tmp_path / "other" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    arguments = ["@model", "--reference", tmp_path / "other", "--text", "@text.jsonl"]
    assert run(files, *arguments) == 2
    assert "differ; the two models cannot be compared" in capsys.readouterr().err


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path, files):
    write_checkpoint(tmp_path / "small", tiny_config(vocab_size=100))
    with pytest.raises(CcqError, match="has vocab_size 100"):
        command.evaluate(tmp_path / "small", text=files / "text.jsonl", window=64)
    with pytest.raises(CcqError, match=r"tasks\.jsonl:2: .* has vocab_size 100"):
        command.evaluate(tmp_path / "small", tasks=[files / "tasks.jsonl"])


def test_without_paddle(files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "paddle", None)
    assert run(files, "@model", "--text", "@text.jsonl") == 2
    assert "pip install 'paddle-ccq[eval]'" in capsys.readouterr().err


def test_too_little_memory(files, monkeypatch, capsys):
    monkeypatch.setattr(command, "available_memory", lambda: 1000)
    assert run(files, "@model", "--text", "@text.jsonl", "--window", "64") == 2
    assert "use a larger machine" in capsys.readouterr().err


def test_tokens_are_counted_as_in_other_commands() -> None:
    assert EvaluateOptions(max_tokens="4k").max_tokens == 4096
    assert EvaluateOptions(max_tokens=100).max_tokens == 100
    with pytest.raises(CcqError, match="--max-tokens 0"):
        EvaluateOptions(max_tokens="0")
