# SPDX-License-Identifier: Apache-2.0
"""quantize --calibration: not resumable, not reproducible, no provenance, or no gain."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from helpers.configs import CALIBRATED
from helpers.runs import contents, stop_after
from helpers.synthetic import write_checkpoint
from paddle_ccq.calibration.session import memory_facts
from paddle_ccq.calibration.settings import CalibrationSettings
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.errors import CcqError
from paddle_ccq.families.registry import read_config
from paddle_ccq.quantize import main, quantize
from paddle_ccq.verify import verify

CONFIGS = Path(__file__).parent.parent / "examples" / "configs"


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model(CALIBRATED)


@pytest.fixture(scope="module")
def options(calibrated_options) -> dict:
    return calibrated_options


@pytest.fixture(scope="module")
def calibrated(model, options, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "out"
    quantize(model, out, threads=1, **options)
    return out


def test_outputs_are_closer_than_those_of_a_data_free_run(model, calibrated, tmp_path):
    quantize(model, tmp_path / "free", preset="best", quiet=True)
    verify(calibrated)
    source = open_checkpoint(model)
    lines = [json.loads(x) for x in Path(f"{calibrated}.log.jsonl").read_text().splitlines()]
    experts = [
        line for line in lines if ".experts." in line["name"] and "shared" not in line["name"]
    ]
    assert len(experts) == 8
    for line in experts:
        assert 0 < line["output_rel_mse"] < 0.03 < 0.1 < line["rel_mse"]
        assert line["calibration_tokens"] > 0
    assert not any("output_rel_mse" in line for line in lines if line not in experts)
    # Of the same files, all but the experts' tensors are the same.
    uncalibrated, ours = open_checkpoint(tmp_path / "free"), open_checkpoint(calibrated)
    for name in source.names():
        same = np.array_equal(uncalibrated.read(name), ours.read(name))
        assert same == (".experts." not in name or "shared" in name), name


def test_threads_do_not_matter(model, calibrated, options, tmp_path):
    quantize(model, tmp_path / "out", threads=2, **options)
    assert contents(tmp_path / "out") == contents(calibrated)


@pytest.mark.parametrize("items", [9, 26])
def test_an_interrupted_run_ends_with_the_same_bytes(
    model, calibrated, options, tmp_path, monkeypatch, items
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, items)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, out, threads=1, **options)
    # Another text is another job.
    other = {**options, "calibration_tokens": "512"}
    with pytest.raises(CcqError, match="calibration"):
        quantize(model, out, threads=1, **other)
    with pytest.raises(CcqError, match="calibration"):
        quantize(model, out, threads=1, preset="fast", quiet=True)
    quantize(model, out, threads=1, **options)
    assert contents(out) == contents(calibrated)


@pytest.mark.parametrize("unnamed", [False, True])
def test_a_pipe_is_read_once_and_gives_the_same_model(
    model, calibration_text, options, tmp_path, monkeypatch, unnamed
):
    """Also where the text is used twice, and where the run is taken up again."""
    options = {**options, "threads": 1, "allocate": "2.6bpw", "allow_plugin_layout": True}
    (tmp_path / "in").mkdir()
    pipe = tmp_path / "in" / "text.jsonl"
    os.mkfifo(pipe)

    def run(name: str, **more) -> None:
        writer = threading.Thread(target=lambda: pipe.write_bytes(calibration_text.read_bytes()))
        writer.start()
        if unnamed:
            descriptor = os.open(pipe, os.O_RDONLY)
            try:
                # The shell gives another number every time.
                quantize(
                    model, tmp_path / name, **options | {"calibration": f"/dev/fd/{descriptor}"}
                )
            finally:
                os.close(descriptor)
                writer.join()
        else:
            quantize(model, tmp_path / name, **options | {"calibration": pipe})
            writer.join()

    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            run("out")
    with open(os.devnull) as other:  # so that the number differs
        assert other.fileno() > 0
        run("out")
    quantize(model, tmp_path / "whole", **options)
    found, wanted = contents(tmp_path / "out"), contents(tmp_path / "whole")
    if unnamed:
        said = json.loads((tmp_path / "out" / "config.json").read_text())["paddle_ccq"]
        assert said["calibration"]["text"] == "pipe"
        for own in ("config.json", "README.md", "ccq-manifest.json"):
            found.pop(own, None), wanted.pop(own, None)
    assert found == wanted


def test_provenance(calibrated, calibration_text):
    config = json.loads((calibrated / "config.json").read_text())
    said = config["paddle_ccq"]["calibration"]
    assert said["text"] == "text.jsonl" and said["tokens_used"] == 1024
    assert len(said["text_sha256"]) == 64
    card = (calibrated / "README.md").read_text()
    assert "calibrated search, preset fast" in card and said["text_sha256"] in card
    assert "No data was used" not in card
    assert str(calibration_text.parent) not in card + json.dumps(config)


def test_every_rank_gets_the_statistics_of_its_own_rows(model, options, tmp_path):
    quantize(model, tmp_path / "out", tensor_parallel_size=2, **options)
    log = Path(f"{tmp_path / 'out'}.log.jsonl").read_text().splitlines()
    errors = [line["output_rel_mse"] for line in map(json.loads, log) if "output_rel_mse" in line]
    assert len(errors) == 8 and max(errors) < 0.05


def test_coverage_is_said_and_experts_without_tokens_are_listed(
    calibration_text, options, tmp_path, capsys
):
    bias = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    extra = {bias: np.array([[0, -9.0]], np.float32)}
    write_checkpoint(tmp_path / "model", CALIBRATED, extra=extra)
    flags = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    flags += ["--calibration", str(calibration_text), "--calibration-tokens", "1k"]
    flags += ["--preset", "fast"]
    assert main(flags) == 0
    said = capsys.readouterr().err
    assert "tokens per expert: min 0, median" in said and "max 1,024" in said
    assert "1 experts saw no token and were encoded data-free: layers.1.mlp.experts.1" in said
    verify(tmp_path / "out")


def test_the_plan_says_what_calibration_needs(calibration_text, capsys):
    folder = str(CONFIGS / "ernie-4.5-300b-a47b")
    assert main(["--model", folder, "--dry-run", "--calibration", str(calibration_text)]) == 0
    out = capsys.readouterr().out
    assert "at most 262,144 tokens" in out and "in a file of the partial folder" in out
    config = read_config(CONFIGS / "ernie-4.5-300b-a47b")
    ((_, small),) = memory_facts(config, CalibrationSettings(tokens=16384))
    assert "in memory" in small


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--calibration", "/none.jsonl"], "no such file"),
        (["--calibration", "TEXT", "--calibration-tokens", "x"], "--calibration-tokens x"),
        (["--calibration-tokens", "1k"], "needs --calibration"),
        (["--calibration", "TEXT", "--encoder", "paper"], "does not go with --encoder paper"),
        (["--calibration", "TEXT", "--format", "ccq-2.5"], "only wint2 and ccq-2t experts"),
        (["--calibration", "TEXT", "--wint4-end-layer", "2"], "only wint2 and ccq-2t experts"),
        (["--calibration", "MODEL/config.json"], "config.json:1: none of the fields"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(
    model, calibration_text, tmp_path, capsys, flags, message
):
    places = {"TEXT": str(calibration_text), "MODEL": str(model)}
    for word, place in places.items():
        flags = [flag.replace(word, place) for flag in flags]
    assert main(["--model", str(model), "--output", str(tmp_path / "out"), *flags]) == 2
    # Messages about the model may come first; the error is the last line.
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert list(tmp_path.iterdir()) == []
