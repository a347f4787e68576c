# SPDX-License-Identifier: Apache-2.0
"""The quantize command: flags, output, dry run, exit codes, and the console script."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq import cli
from paddle_ccq.quantize import main, quantize

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "examples" / "configs"


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model(tiny_config(num_hidden_layers=2, moe_num_experts=2))


def test_dry_run_of_the_300b_from_its_config_alone(capsys):
    flags = ["--model", str(CONFIGS / "ernie-4.5-300b-a47b"), "--dry-run", "--preset", "fast"]
    assert main(flags) == 0
    out = capsys.readouterr().out
    for text in (
        "layers.7-53.mlp.experts.0-63.up_gate_proj",
        "layers.3-6.mlp.experts.0-63.down_proj",
        "output: 93.82 GB (1 GB = 1e9 bytes; 87.38 GiB)",
        "bits per weight, routed experts: 2.228",
        "wint4 MoE layers: up to layer 6",
        "peak memory",
        "measured just now",
        "disk needed",
    ):
        assert text in out


def test_dry_run_writes_nothing_and_downloads_nothing(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({**tiny_config(), "dtype": "bfloat16"}))
    flags = ["--model", str(tmp_path), "--output", str(tmp_path / "out"), "--dry-run"]
    assert main(flags) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert main(["--model", "ERNIE-4.5-300B", "--dry-run"]) == 2
    assert "downloads nothing" in capsys.readouterr().err


def test_dry_run_of_a_tensor_parallel_and_of_an_all_wint4_plan(model, capsys):
    assert main(["--model", str(model), "--dry-run", "--wint4-end-layer", "1"]) == 0
    assert "nothing becomes 2-bit" in capsys.readouterr().out


def test_run_prints_a_summary_and_logs_every_matrix(model, tmp_path, capsys):
    out, log = tmp_path / "out", tmp_path / "log.jsonl"
    flags = ["--model", str(model), "--output", str(out), "--log", str(log), "--threads", "1"]
    assert main(flags) == 0
    captured = capsys.readouterr()
    assert "mean rel-MSE" in captured.out and "peak memory" in captured.out
    assert "read" in captured.out and "encode" in captured.out and "write" in captured.out
    assert captured.err.count("\r") == 0  # no bar where stderr is not a terminal
    records = [json.loads(line) for line in log.read_text().splitlines()]
    expert = next(r for r in records if ".experts.0.up_gate_proj" in r["name"])
    assert expert["format"] == "wint2"
    assert expert["shape"] == [128, 256]
    assert 0.05 < expert["rel_mse"] < 0.12 and 0.9 < expert["cosine"] < 1
    assert expert["bpw"] == pytest.approx(2.0625 + 80 / 128)
    assert expert["seconds"] > 0
    names = [record["name"] for record in records]
    assert len(names) == len(set(names)) == 2 * 4 + 2 * 2 + 2 + 2 * 2 + 2


def test_default_log_lies_beside_the_output(model, tmp_path):
    quantize(model, tmp_path / "out", preset="fast", quiet=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.log.jsonl"]


def test_underscores_do_as_well(model, tmp_path):
    flags = ["--model", str(model), "--output", str(tmp_path / "out"), "--wint4_end_layer", "-1"]
    flags += ["--max_shard_size", "1MB", "--fastdeploy_layout", "2.0", "--tensor_parallel_size=1"]
    assert main([*flags, "--quiet", "--allow_nonfinite", "--preset", "fast"]) == 0


def test_quiet_is_quiet(model, tmp_path, capsys):
    flags = ["--model", str(model), "--output", str(tmp_path / "out"), "--quiet"]
    assert main([*flags, "--preset", "fast"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--model", "/no/such/folder", "--output", "x"], "no such folder"),
        (["--model", "MODEL"], "--output is missing"),
        (["--model", "MODEL", "--output", "OUT", "--max-shard-size", "big"], "--max-shard-size"),
        (["--model", "MODEL", "--output", "OUT", "--threads", "0"], "--threads 0"),
        (["--model", "MODEL", "--output", "OUT", "--rules", "/none.yaml"], "no such file"),
        (["--model", "MODEL", "--output", "OUT", "--wint4-end-layer", "7"], "--wint4-end-layer 7"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(model, tmp_path, capsys, flags, text):
    known = {"MODEL": str(model), "OUT": str(tmp_path / "out")}
    assert main([known.get(flag, flag) for flag in flags]) == 2
    error = capsys.readouterr().err.strip()
    assert text in error
    assert error.startswith("error: ") and "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_unknown_choices_are_refused_by_the_parser(model, capsys):
    for flags in (["--format", "int3"], ["--preset", "x"], ["--no-such-flag"]):
        assert main(["--model", str(model), "--output", "x", *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and flags[0] in error


def test_encoder_paper(model, tmp_path):
    search = quantize(model, tmp_path / "a", quiet=True)
    paper = quantize(model, tmp_path / "b", encoder="paper", quiet=True)

    def mean(result):
        errors = [r["stats"]["rel_mse"] for r in result.records if ".experts." in r["name"]]
        return sum(errors) / len(errors)

    assert mean(paper) > mean(search)
    assert "algorithm of arXiv" in (tmp_path / "b" / "README.md").read_text()


def test_model_card(model, tmp_path):
    quantize(model, tmp_path / "out", wint4_end_layer=0, preset="fast", quiet=True)
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (
        "base model | tiny",
        "fastdeploy-2.1",
        "python -m paddle_ccq.verify",
        "fastdeploy.entrypoints.openai.api_server",
        "| experts, down_proj | wint2 | 2 |",
    ):
        assert text in card


# --- console script -----------------------------------------------------------------------------


def test_console_script(model, tmp_path, capsys):
    flags = ["--model", str(model), "--output", str(tmp_path / "out"), "--preset", "fast"]
    assert cli.main(["quantize", *flags]) == 0
    assert cli.main(["verify", str(tmp_path / "out")]) == 0
    assert cli.main(["--help"]) == 0
    assert "dequantize" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert cli.main([]) == 2
    assert cli.main(["quantise"]) == 2
    assert "the commands are quantize, verify" in capsys.readouterr().err


def test_nothing_but_evaluate_needs_paddle(tmp_path):
    code = (
        "import sys; sys.modules['paddle'] = None\n"
        "from paddle_ccq import api\n"
        "api.quantize, api.verify, api.dequantize\n"
        "import paddle_ccq.cli\n"
        "from paddle_ccq.cli import COMMANDS\n"
        "assert set(dir(api)) <= {module for module, _ in COMMANDS.values()}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "paddle_ccq", "quantize", "--help"], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0 and b"--wint4-end-layer" in done.stdout


def test_a_log_that_exists_is_not_overwritten(tmp_path, capsys):
    write_checkpoint(tmp_path / "model", tiny_config())
    log = tmp_path / "notes.txt"
    log.write_text("mine")
    out = tmp_path / "out"
    flags = ["--model", str(tmp_path / "model"), "--output", str(out), "--log", str(log)]
    assert main(flags) == 2
    assert "--log" in capsys.readouterr().err
    assert log.read_text() == "mine" and not out.exists()
