# SPDX-License-Identifier: Apache-2.0
"""The check before vLLM loads a checkpoint: what it finds, prints and refuses; without vLLM."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.configs import tiny_config
from paddle_ccq.engine_check import GIB, default_length
from paddle_ccq.quantize import quantize
from paddle_ccq.vllm.check import ServeConfig, check, main
from paddle_ccq.vllm.claims import Parallel

CONFIG = tiny_config(
    num_hidden_layers=2,
    moe_num_experts=2,
    moe_intermediate_size=256,
    max_position_embeddings=65536,
    tie_word_embeddings=False,
)
SERVE = ServeConfig(card_bytes=24 * GIB)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("made") / "quantized"
    quantize(tiny_model(CONFIG), folder, preset="fast", quiet=True)
    return folder


def test_a_good_checkpoint_and_its_memory(made: Path, tmp_path: Path, capsys) -> None:
    report = tmp_path / "report.json"
    assert main([str(made), "--gpu-memory", "24", "--json", str(report)]) == 0
    out = capsys.readouterr().out
    assert f"vllm serve {made}" in out and f"good: {made} for vLLM" in out
    found = json.loads(report.read_text())
    memory = found["memory"]
    assert found["good"] and memory["total"] == 24 * GIB
    parts = sum(memory[name] for name in ("weights", "activations", "libraries", "cache"))
    assert parts == int(24 * GIB * 0.92)
    assert memory["tokens"] % 16 == 0
    assert (
        0
        <= memory["cache"] - memory["tokens"] * memory["token_cache"]
        < (16 * memory["token_cache"])
    )


def test_weights_are_what_a_card_holds(made: Path) -> None:
    one = check(made, SERVE).memory
    stored = 0
    for path in made.glob("*.safetensors"):
        with path.open("rb") as file:
            stored += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    # On the card a column of an expert has 16 bytes of scales and constants, in the file 10.
    columns = 2 * (2 * 256 + CONFIG["hidden_size"])  # of two experts, in the one MoE layer
    assert one.weights == stored + 6 * columns
    two = check(made, replace(SERVE, parallel=Parallel(pipeline=2))).memory
    assert one.weights / 2 <= two.weights < one.weights


def test_memory_that_does_not_fit(made: Path, capsys) -> None:
    assert main([str(made), "--gpu-memory", "2"]) == 1
    assert "GiB more than a card's usable part" in capsys.readouterr().out
    result = check(made, replace(SERVE, max_model_len=100_000_000))
    assert any("does not fit; at most --max-model-len" in p for p in result.problems)


def test_sequences_that_do_not_all_fit_are_a_warning(made: Path) -> None:
    tight = replace(SERVE, card_bytes=4 * GIB)
    result = check(made, tight)
    assert result.good and any(
        "sequences of 32768 tokens fit at once" in w for w in result.warnings
    )
    assert not any("fit at once" in w for w in check(made, replace(tight, max_num_seqs=1)).warnings)


def test_one_line_for_a_missing_file_(made: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    shard = next(copy.glob("*.safetensors"))
    shard.unlink()
    about = [p for p in check(copy, SERVE).problems if p.startswith(shard.name)]
    assert len(about) == 1 and "missing" in about[0]


def test_names_cannot_command_the_terminal(made: Path, tmp_path: Path, capsys) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "a\x1b[31mb"))
    assert main([str(copy), "--gpu-memory", "24"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\x1b[31m" in out


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"card_bytes": 0}, "--gpu-memory must be positive"),
        ({"max_num_seqs": 0}, "--max-num-seqs must be positive"),
        ({"gpu_memory_utilization": 1.5}, "--gpu-memory-utilization 1.5"),
        ({"gpu_memory_utilization": 1.0000001}, "--gpu-memory-utilization 1.0000001"),
        ({"max_num_batched_tokens": 64}, "64: vLLM wants at least --max-num-seqs, 128"),
        ({"parallel": Parallel(tensor=0)}, "--tensor-parallel-size must be positive"),
    ],
)
def test_what_cannot_be_served_is_refused(made: Path, change: dict, text: str) -> None:
    from paddle_ccq.errors import CcqError

    with pytest.raises(CcqError, match=text):
        check(made, replace(SERVE, **change))


def test_the_command_has_the_part_of_a_card_that_was_checked(made: Path) -> None:
    part = 0.12345678
    asked = check(made, replace(SERVE, gpu_memory_utilization=part)).command
    assert asked[asked.index("--gpu-memory-utilization") + 1] == str(part)


SHORT = CONFIG | {"max_position_embeddings": 2048}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("short") / "quantized"
    quantize(tiny_model(SHORT), folder, preset="fast", quiet=True)
    return folder


def test_the_printed_command_stays_within_the_model(short: Path, capsys) -> None:
    """vLLM refuses a --max-model-len beyond what config.json and the tokenizer state."""
    assert main([str(short), "--gpu-memory", "24"]) == 0
    assert "--max-model-len 2048 " in capsys.readouterr().out
    assert main([str(short), "--gpu-memory", "24", "--max-model-len", "2049"]) == 1
    said = capsys.readouterr().out
    assert "max_position_embeddings of the model is 2048" in said and "vllm serve" not in said


def test_the_tokenizer_can_allow_less(short: Path, tmp_path: Path, capsys) -> None:
    copy = Path(shutil.copytree(short, tmp_path / "copy"))
    (copy / "ccq-manifest.json").unlink()
    (copy / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    problems = check(copy, replace(SERVE, max_model_len=2048)).problems
    assert any("model_max_length of the model is 1024" in problem for problem in problems)
    assert not check(copy, replace(SERVE, max_model_len=1024)).problems
    assert main([str(copy), "--gpu-memory", "24"]) == 0
    assert "--max-model-len 1024 " in capsys.readouterr().out
    # What transformers writes for "no limit", and what states none.
    for value in ("1e30", "Infinity", "NaN", "0", "true", '"many"', "null"):
        (copy / "tokenizer_config.json").write_text(f'{{"model_max_length": {value}}}')
        assert not check(copy, replace(SERVE, max_model_len=2048)).problems
        assert main([str(copy), "--gpu-memory", "24"]) == 0
        assert "--max-model-len 2048 " in capsys.readouterr().out


@pytest.mark.parametrize("positions", [None, "many", 0])
def test_the_default_length_without_positions(tmp_path: Path, positions: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
    assert default_length(tmp_path) == 32768


def test_the_default_length_of_a_text_config(tmp_path: Path) -> None:
    nested = {"text_config": {"max_position_embeddings": 1000}, "max_position_embeddings": 9}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert default_length(tmp_path) == 1000 and default_length(tmp_path, 64) == 960
    assert default_length(tmp_path, 4096) == 4096 and default_length(tmp_path / "no") == 32768


def test_a_card_larger_than_any(made: Path, capsys) -> None:
    assert main([str(made), "--gpu-memory", "1e300"]) == 2
    assert "--gpu-memory 1e+300: more GiB than any card has" in capsys.readouterr().err
