# SPDX-License-Identifier: Apache-2.0
"""tune: codes touched, a loss that does not fall, leftovers of a stopped run, a wrong model."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from helpers.runs import contents
from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.calibration.settings import CalibrationSettings
from paddle_ccq.calibration.text import read_calibration_text
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.errors import CcqError
from paddle_ccq.models.ernie import Ernie
from paddle_ccq.quantize import quantize
from paddle_ccq.tune import main, tune
from paddle_ccq.tuning import descent, memory, session
from paddle_ccq.tuning.descent import split_held_out
from paddle_ccq.tuning.settings import TuningSettings
from paddle_ccq.tuning.teacher import final_states
from paddle_ccq.verify import verify

CONFIG = tiny_config(moe_num_experts=3, tie_word_embeddings=False)
# A random model's gradients are noise beside a trained one's, so it takes a few larger steps.
OPTIONS = {"tokens": "2k", "batch": 1, "learning_rate": 0.01, "dense_learning_rate": 0.001}


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model(CONFIG)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz ,.0123456789"
    lines = [{"text": "".join(rng.choices(letters, k=300))} for _ in range(8)]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    quantize(model, out, preset="fast", quiet=True, max_shard_size=200_000)
    return out


@pytest.fixture(scope="module")
def tuned(model, text, quantized, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned") / "out"
    return tune(quantized, model, text, out, threads=1, **OPTIONS)


def test_the_loss_on_held_out_text_falls(tuned):
    assert 0 < tuned.after < 0.97 * tuned.before
    said = json.loads((tuned.output / "config.json").read_text())["paddle_ccq"]["tuning"]
    assert said["loss_before"] == pytest.approx(tuned.before, abs=1e-5)
    assert said["tokens_learned"] == tuned.tokens == 7 * 256 and said["tokens_held_out"] == 256


def test_the_loss_while_tuning_is_that_of_the_stored_tensors(
    quantized, model, text, tmp_path, monkeypatch
):
    """Without rounding on the way, wint8 and bfloat16 would take back part of the gain."""
    found = []
    original = session.descend

    def watched(*args: object) -> tuple[float, float]:
        found.append(original(*args))
        return found[0]

    monkeypatch.setattr(session, "descend", watched)
    result = tune(quantized, model, text, tmp_path / "out", **OPTIONS)
    before, best = found[0]
    assert result.after == pytest.approx(best, rel=1e-3) and best < before
    with ThreadPoolExecutor(1) as pool:
        written = read_calibration_text(
            text, open_checkpoint(model), CalibrationSettings(2048)
        ).windows
        _, held = split_held_out(len(written), 16)
        teacher = final_states(open_checkpoint(model), written, 1, tmp_path)
        examples = [descent.Example(written[i], teacher[i]) for i in held]
        loss = descent.mean_loss(Ernie(open_checkpoint(tmp_path / "out")), examples, pool)
    assert loss == pytest.approx(result.after, rel=1e-6)


def test_codes_format_and_size_stay(quantized, tuned, model):
    before, after = open_checkpoint(quantized), open_checkpoint(tuned.output)
    assert list(before.tensors.files) == list(after.tensors.files)
    assert len(before.tensors.files) > 1
    changed = set()
    for name in before.tensors.names():
        assert before.tensors.info(name) == after.tensors.info(name)
        if before.tensors.read(name).tobytes() != after.tensors.read(name).tobytes():
            changed.add(name)
    experts = {n for n in before.tensors.names() if ".experts." in n}
    assert {n for n in experts if n.endswith(".super_scales")} <= changed
    assert {n.rpartition(".")[2] for n in changed & experts} == {"super_scales"}
    kept = {n for n in before.tensors.names() if "embed" in n or "e_score" in n}
    assert kept and not kept & changed
    assert any(n.endswith("layernorm.weight") for n in changed)
    assert any(n.endswith("qkv_proj.quant_weight") for n in changed)


def test_dense_layers_can_be_left_alone(quantized, model, text, tmp_path):
    options = {**OPTIONS, "dense_learning_rate": 0}
    tune(quantized, model, text, tmp_path / "out", threads=2, **options)
    before, after = open_checkpoint(quantized), open_checkpoint(tmp_path / "out")
    for name in before.names():
        if name.endswith("_proj.weight") and ".experts." not in name:
            assert np.array_equal(before.read(name), after.read(name)), name


def test_the_result_is_a_sound_checkpoint(tuned, model):
    found = verify(tuned.output)
    assert found.sound, found.problems
    found = verify(tuned.output, model)
    assert found.sound, found.problems
    card = (tuned.output / "README.md").read_text()
    assert "## Tuning" in card and card.count("\n# ") <= 1


def test_tuning_twice_adds_up_and_says_so_once(tuned, model, text, tmp_path):
    options = {**OPTIONS, "learning_rate": 0.003}
    again = tune(tuned.output, model, text, tmp_path / "out", threads=1, **options)
    assert again.before == pytest.approx(tuned.after, rel=1e-6)
    assert (again.output / "README.md").read_text().count("## Tuning") == 1


def test_threads_do_not_matter(quantized, model, text, tuned, tmp_path):
    tune(quantized, model, text, tmp_path / "out", threads=3, **OPTIONS)
    assert contents(tmp_path / "out") == contents(tuned.output)


@pytest.mark.parametrize("place", ["learning", "writing", "publishing"])
def test_a_stopped_run_leaves_nothing(quantized, model, text, tmp_path, monkeypatch, place):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    owner, name = {
        "learning": (descent.Pass, "run"),
        "writing": (session, "stored_tensors"),
        "publishing": (session.Workplace, "publish"),
    }[place]
    monkeypatch.setattr(owner, name, stop)
    with pytest.raises(KeyboardInterrupt):
        tune(quantized, model, text, tmp_path / "out", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_replaced(quantized, model, text, tuned, tmp_path):
    left = tmp_path / "out.ccq-partial" / "checkpoint"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    tune(quantized, model, text, tmp_path / "out", threads=1, **OPTIONS)
    assert contents(tmp_path / "out") == contents(tuned.output)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_no_gain_writes_nothing(quantized, model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(descent.Adam, "step", lambda *_: None)
    with pytest.raises(CcqError, match="did not lower the loss"):
        tune(quantized, model, text, tmp_path / "out", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_end_in_one_line_and_exit_code_2(quantized, model, text, tuned, tmp_path, capsys):
    write_checkpoint(tmp_path / "other", CONFIG, seed=5)
    write_checkpoint(tmp_path / "wider", {**CONFIG, "moe_num_experts": 4})
    (tmp_path / "short.txt").write_text("a b c")
    usual = {"folder": quantized, "model": model, "calibration": text, "output": tmp_path / "out"}
    cases: list[tuple[dict, list[str], str]] = [
        ({"model": tmp_path / "other"}, [], "another model than"),
        ({"model": tmp_path / "wider"}, [], "the two differ in"),
        ({"model": quantized}, [], "quantized itself"),
        ({"folder": model}, [], "nothing to tune"),
        ({"calibration": tmp_path / "none.txt"}, [], "no such file"),
        ({"calibration": tmp_path / "short.txt"}, [], "less than two windows"),
        ({"output": tuned.output}, [], "exists already"),
        ({"output": quantized / "in"}, [], "model's own folder"),
        ({}, ["--learning-rate", "-1"], "--learning-rate -1.0"),
        ({}, ["--dense-learning-rate", "nan"], "--dense-learning-rate: 'nan' is not a "),
        ({}, ["--tokens", "x"], "--tokens x: not a number of tokens"),
        ({}, ["--passes", "0"], "--passes 0"),
        ({}, ["--batch", "0"], "--batch 0"),
        ({}, ["--threads", "0"], "--threads 0"),
    ]
    before = sorted(p.name for p in tmp_path.iterdir())
    for change, flags, message in cases:
        given = {**usual, **change}
        folder = str(given.pop("folder"))
        named = [str(x) for name, value in given.items() for x in (f"--{name}", value)]
        assert main([folder, *named, *flags]) == 2, message
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error, error
        assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_model_too_large_for_the_memory_is_refused(quantized, model, text, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(quantized)
    needed = memory.needed_bytes(checkpoint, TuningSettings(tokens=2048), 1)
    weights = sum(int(np.prod(checkpoint.shape(name))) for name in checkpoint.names())
    assert 4 * weights < needed < 2e9
    monkeypatch.setattr(memory, "available_memory", lambda: needed // 2)
    with pytest.raises(CcqError, match="whole model as float32"):
        tune(quantized, model, text, tmp_path / "out", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_held_out_windows_are_spread_and_apart():
    learned, held = split_held_out(64, 16)
    assert held == [8, 24, 40, 56] and sorted(learned + held) == list(range(64))
    assert split_held_out(2, 16) == ([0], [1])
    with pytest.raises(CcqError, match="two windows"):
        split_held_out(1, 16)
