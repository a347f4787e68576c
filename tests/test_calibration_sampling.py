# SPDX-License-Identifier: Apache-2.0
"""sample: text not from the model's distribution, not reproducible, or half a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import paddle
import pytest

from helpers.synthetic import tiny_config
from paddle_ccq.calibration.sampling import sample_documents, sample_streams
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.errors import CcqError
from paddle_ccq.models.ernie import Ernie
from paddle_ccq.sample import main, sample
from paddle_ccq.texts.documents import read_documents

CONFIG = tiny_config(
    num_hidden_layers=2, vocab_size=320, tie_word_embeddings=False, moe_num_experts=2, moe_k=1
)


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model(CONFIG)


def test_tokens_come_as_often_as_their_probability_says(model):
    ernie = Ernie(open_checkpoint(model))
    streams = sample_streams(ernie, 1, 4000, 2, [0, 0])
    assert (streams[:, 0] == 1).all()
    logits = ernie.logits(ernie.hidden_states(paddle.to_tensor([[1]]))[0, -1]).numpy()
    expected = np.exp(logits - logits.max())
    expected = 4000 * expected / expected.sum()
    found = np.bincount(streams[:, 1], minlength=expected.size)
    # Chi squared over 320 tokens: mean 319, standard deviation 25.
    assert np.square(found - expected).sum() > 0
    assert (np.square(found - expected) / expected).sum() < 319 + 6 * 25


def test_a_stream_goes_on_where_the_model_would(model):
    """A stream's likelihood under one forward pass: the cache is not shifted by a place."""
    ernie = Ernie(open_checkpoint(model))
    streams = sample_streams(ernie, 1, 64, 24, [1, 0])
    logits = ernie.logits(ernie.hidden_states(paddle.to_tensor(streams))).numpy()
    likely = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    own = np.take_along_axis(likely[:, :-1], streams[:, 1:, None], axis=2).mean()
    entropy = -(np.exp(likely[:, :-1]) * likely[:, :-1]).sum(axis=-1).mean()
    shifted = np.take_along_axis(likely[:, 1:], streams[:, 1:, None], axis=2).mean()
    assert abs(own + entropy) < 0.1 < own - shifted


def test_documents_hold_no_frames_and_do_not_depend_on_threads(model):
    ernie = Ernie(open_checkpoint(model))
    one = list(sample_documents(ernie, 1, 2, 128 * 40, 40, 3, 1))
    two = list(sample_documents(ernie, 1, 2, 128 * 40, 40, 3, 2))
    other = list(sample_documents(ernie, 1, 2, 128 * 40, 40, 4, 2))
    assert one == two != other
    assert len(one) >= 128 and all(document for document in one)
    assert not {1, 2} & {token for document in one for token in document}


def test_the_file_can_be_calibrated_on(model, tmp_path, capsys):
    out = tmp_path / "made.jsonl"
    assert main([str(model), "--output", str(out), "--tokens", "1k"]) == 0
    assert "documents in" in capsys.readouterr().out
    documents = read_documents(out)
    assert documents and all(json.loads(x)["text"] for x in out.read_text().splitlines())
    assert [p.name for p in tmp_path.iterdir()] == ["made.jsonl"]
    with pytest.raises(CcqError, match="exists already"):
        sample(model, out)


def test_mistakes_are_one_line(model, tmp_path):
    for change, message in (
        ({"output": tmp_path / "a.txt"}, "must be named .jsonl"),
        ({"tokens": "x"}, "--tokens x"),
        ({"tokens": 1}, "at least 2"),
        ({"threads": 0}, "--threads 0"),
        ({"seed": -1}, "--seed -1"),
        ({"model": tmp_path / "none"}, "none"),
    ):
        with pytest.raises(CcqError, match=message):
            sample(**{"model": model, "output": tmp_path / "a.jsonl", **change})
    assert list(tmp_path.iterdir()) == []
