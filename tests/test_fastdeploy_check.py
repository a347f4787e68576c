# SPDX-License-Identifier: Apache-2.0
"""The check before FastDeploy: contract by version, rank folders, memory, command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.synthetic import tiny_config
from helpers.synthetic import write_checkpoint as write_without_sentencepiece
from paddle_ccq.engine_check import GIB, CardMemory
from paddle_ccq.errors import CcqError
from paddle_ccq.families.registry import read_config
from paddle_ccq.fastdeploy import check as check_module
from paddle_ccq.fastdeploy.cards import parse_cards
from paddle_ccq.fastdeploy.check import CheckResult, ServeConfig, check, judge_machine, main
from paddle_ccq.fastdeploy.memory import card_memory, loaded_bytes, weight_bytes
from paddle_ccq.fastdeploy.releases import RELEASES, find_release
from paddle_ccq.fastdeploy.server_flags import arguments, four_ports, known_flags
from paddle_ccq.host import available_memory
from paddle_ccq.quantize import quantize
from paddle_ccq.targets.fastdeploy.layout import OWN_FORMATS, build_plan

ROOT = Path(__file__).parent.parent
CONFIG = tiny_config(
    num_hidden_layers=2, moe_num_experts=2, moe_intermediate_size=256, max_position_embeddings=65536
)
SERVE = ServeConfig(card_bytes=24 * GIB)


def write_checkpoint(folder: Path, config: dict) -> None:
    """With a file where FastDeploy's tokenizer looks for SentencePiece; only its name matters."""
    write_without_sentencepiece(folder, config)
    (folder / "tokenizer.model").write_bytes(b"spm")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[int, Path]:
    """A checkpoint by its number of ranks."""
    root = tmp_path_factory.mktemp("made")
    write_checkpoint(root / "m", CONFIG)
    for ranks in (1, 2):
        quantize(
            root / "m",
            root / f"tp{ranks}",
            preset="fast",
            tensor_parallel_size=ranks,
            quiet=True,
        )
    return {ranks: root / f"tp{ranks}" for ranks in (1, 2)}


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "copy"))


def edit_config(folder: Path, edit) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    (folder / "ccq-manifest.json").unlink(missing_ok=True)


def only_problem(folder: Path, serve: ServeConfig) -> str:
    problems = check(folder, serve).problems
    assert len(problems) == 1, problems
    return problems[0]


def test_a_good_checkpoint_and_its_command(made, capsys, tmp_path) -> None:
    out = tmp_path / "found.json"
    assert main([str(made[1]), "--gpu-memory", "24", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    for line in ("--port 8180", "--metrics-port 8181", "--engine-worker-queue-port 8182"):
        assert line in text
    assert "--cache-queue-port 8183" in text and "--load-choices default" in text
    found = json.loads(out.read_text())
    assert found["good"] and found["memory"]["tokens"] > 32768
    assert found["command"][:3] == ["python", "-m", "fastdeploy.entrypoints.openai.api_server"]


def test_rank_folders_and_cards_must_agree(made) -> None:
    assert check(made[2], replace(SERVE, tensor_parallel_size=2)).good
    assert "2 rank folders, but" in only_problem(made[2], SERVE)
    text = only_problem(made[1], replace(SERVE, tensor_parallel_size=2))
    assert "no rank folders" in text and "--tensor-parallel-size 2" in text


def test_a_stray_rank_folder(made, tmp_path) -> None:
    folder = Path(shutil.copytree(made[2], tmp_path / "tp2"))
    (folder / "rank_old").mkdir()
    assert "rank_old" in only_problem(folder, replace(SERVE, tensor_parallel_size=2))


def test_row_order_follows_the_version(made) -> None:
    for name in ("2.1", "2.3", "2.6"):
        assert check(made[1], replace(SERVE, release=RELEASES[name])).good
    text = only_problem(made[1], replace(SERVE, release=RELEASES["2.0"]))
    assert "plain" in text and "--fastdeploy-layout 2.0" in text


def test_wint4_layers_by_a_list_need_the_plugin(tmp_path) -> None:
    write_checkpoint(tmp_path / "m", {**CONFIG, "num_hidden_layers": 3})
    rules = tmp_path / "rules.yaml"
    rules.write_text('- {match: "*.layers.2.mlp.experts.*", format: wint4}\n')
    out = tmp_path / "out"
    quantize(tmp_path / "m", out, rules=rules, allow_plugin_layout=True, preset="fast", quiet=True)
    result = check(out, SERVE)
    assert result.good and any("FD_PLUGINS=paddle_ccq" in w for w in result.warnings)
    text = only_problem(out, replace(SERVE, release=RELEASES["2.3"]))
    assert "by a list" in text and "2.4, 2.5, 2.6" in text


def test_an_unrecorded_row_order_is_a_warning(copy) -> None:
    edit_config(copy, lambda c: c.pop("paddle_ccq"))
    result = check(copy, SERVE)
    assert result.good
    assert any("row order is not recorded" in w for w in result.warnings)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda c: c.update(moe_use_aux_free=False), "moe_use_aux_free: false"),
        (lambda c: c.update(moe_use_aux_free=None), "moe_use_aux_free is absent"),
        (lambda c: c.update(moe_gate_act="sigmoid"), "moe_gate_act: 'sigmoid'"),
        (lambda c: c.update(torch_dtype="bfloat16"), "torch_dtype"),
        (lambda c: c.update(transformers_version="4.57.1"), "transformers_version"),
        (lambda c: c["quantization_config"].update(is_quantized=False), "is_quantized"),
    ],
)
def test_config_rules(copy, edit, text) -> None:
    edit_config(copy, edit)
    assert text in only_problem(copy, SERVE)


def test_layers_that_fastdeploy_would_take_as_moe(tmp_path) -> None:
    source = tmp_path / "m"
    write_checkpoint(source, tiny_config(moe_num_experts=2, moe_layer_end_index=1))
    quantize(source, tmp_path / "o", preset="fast", quiet=True)
    assert "every layer from 1 on" in only_problem(tmp_path / "o", SERVE)


@pytest.mark.parametrize("format", OWN_FORMATS)
def test_formats_that_only_the_plugin_serves(tmp_path, format) -> None:
    write_checkpoint(tmp_path / "m", CONFIG)
    out = tmp_path / "out"
    quantize(tmp_path / "m", out, format=format, preset="fast", quiet=True)
    unknown = check(out, SERVE)
    assert unknown.good and unknown.environment == {"FD_PLUGINS": "paddle_ccq"}
    (warning,) = unknown.warnings
    assert f"format {format}: FastDeploy refuses the name" in warning
    assert check(out, replace(SERVE, plugin=True)).warnings == []
    text = only_problem(out, replace(SERVE, plugin=False))
    assert f"format {format}" in text and "--plugin of serving/launch.py" in text
    text = only_problem(out, replace(SERVE, release=RELEASES["2.3"]))
    assert "2.3 has no such format" in text and "2.4, 2.5, 2.6, develop" in text
    card = (out / "README.md").read_text()
    assert "FD_PLUGINS=paddle_ccq python -m fastdeploy" in card
    assert f"FastDeploy itself refuses {format}" in card


def test_the_memory_of_ccq_2t_is_that_of_the_kernels_layout() -> None:
    """Units of 64 columns and 128 rows take 2176 bytes for 2112 stored ones."""
    raw = tiny_config(hidden_size=256, moe_intermediate_size=128)
    plan = build_plan(read_config(raw), format="ccq-2t", wint4_end_layer=-1)
    experts = [p for p in plan.tensors if p.format == "ccq-2t"]
    for planned in experts:
        k, n = planned.shape
        assert planned.rank_bytes == k * n // 4 + k * n // 128 + 2 * n
        assert loaded_bytes(planned) == k // 128 * n // 64 * 2176 + 4 * n
    more = sum(loaded_bytes(p) - p.rank_bytes for p in experts)
    tied = 2 * raw["vocab_size"] * raw["hidden_size"]
    assert weight_bytes(plan) == sum(p.rank_bytes for p in plan.tensors) + tied + more


def test_bf16_layers(tmp_path) -> None:
    source = tmp_path / "m"
    write_checkpoint(source, CONFIG)
    rules = tmp_path / "rules.yaml"
    rules.write_text('- {match: "*.o_proj", format: bf16}\n')
    quantize(source, tmp_path / "kept", rules=rules, preset="fast", quiet=True)
    assert check(tmp_path / "kept", SERVE).good
    assert "2.5 does" in only_problem(tmp_path / "kept", replace(SERVE, release=RELEASES["2.4"]))


def test_hashes_only_when_asked(copy) -> None:
    shard = next(copy.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert check(copy, SERVE).good
    assert not check(copy, SERVE, hashes=True).good


def test_one_line_for_a_missing_file(copy) -> None:
    next(copy.glob("*.safetensors")).unlink()
    assert "missing" in only_problem(copy, SERVE)


def test_hashes_without_a_manifest(copy) -> None:
    (copy / "ccq-manifest.json").unlink()
    assert check(copy, SERVE).warnings == []
    assert "hashes can't be checked" in check(copy, SERVE, hashes=True).warnings[0]


def test_memory_that_does_not_fit(made, capsys) -> None:
    assert main([str(made[1]), "--gpu-memory", "1"]) == 1
    assert "GiB more than a card's usable part" in capsys.readouterr().out
    # 512 bytes of cache a token: 1.6 GiB beside the libraries hold less than 10 million tokens.
    serve = replace(SERVE, card_bytes=2 * GIB, max_model_len=10_000_000)
    assert "one sequence of --max-model-len 10000000 does not fit" in only_problem(made[1], serve)


@pytest.mark.parametrize(
    ("cache", "short"), [(-GIB, "1.1"), (-1, "0.1"), (0, "0.1"), (4096 * 64 - 1, "0.1")]
)
def test_room_for_less_than_a_block_is_no_length_to_ask_for(cache: int, short: str) -> None:
    rest = 3 * GIB
    result = CheckResult("folder")
    memory = CardMemory(rest + cache, 1.0, GIB, GIB, GIB, token_cache=4096, block_tokens=64)
    result.judge_memory(memory, 100, 1)
    [problem] = result.problems
    assert f"one block of the KV cache need {short} GiB more" in problem
    assert "--max-model-len" not in problem


def test_sequences_that_do_not_all_fit_are_a_warning(made) -> None:
    result = check(made[1], replace(SERVE, card_bytes=2 * GIB))
    assert result.good and any("sequences of 32768" in w for w in result.warnings)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--gpu-memory", "24", "--fastdeploy-version", "3.1"], "known are"),
        (["--gpu-memory", "24", "--fastdeploy-version", "new"], "known are"),
        (["--gpu-memory", "24", "--max-num-seqs", "400"], "at most 256"),
        (["--gpu-memory", "-1"], "--gpu-memory must be positive"),
        (["--gpu-memory", "nan"], "--gpu-memory: 'nan' is not a number"),
        (["--gpu-memory", "inf"], "--gpu-memory: 'inf' is not a number"),
        (["--gpu-memory", "1e300"], "--gpu-memory 1e+300: more GiB than any card has"),
        (["--gpu-memory", "24", "--gpu-memory-utilization", "nan"], "is not a number"),
        (["--gpu-memory", "24", "--gpu-memory-utilization", "0"], "above 0 and at most 1"),
        (["--gpu-memory", "24", "--max-num-batched-tokens", "0"], "FastDeploy wants 128"),
        (["--gpu-memory", "24", "--draft-tokens", "-1"], "--draft-tokens -1"),
        (["--gpu-memory", "24", "--tensor-parallel-size", "0"], "must be positive"),
        (["--gpu-memory", "24", "--port", "65533"], "--port 65533"),
        (["--gpu-memory", "24", "--max-num-batched-tokens", "8"], "FastDeploy wants 128"),
        (["--gpu-memory", "24", "--max-model-len", "1000"], "960 or 1024"),
        (["--gpu-memory", "24", "--workers", "0"], "--workers must be positive"),
        (["--gpu-memory", "24", "--block-size", "0"], "--block-size must be positive"),
        (["--gpu-memory", "24", "--fastdeploy-version", "2.3.0-dev"], "a build of a branch"),
    ],
)
def test_serve_configs_that_cannot_be(made, capsys, arguments, text) -> None:
    assert main([str(made[1]), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and text in error


def test_the_printed_command_stays_within_the_model(tmp_path, capsys) -> None:
    write_checkpoint(tmp_path / "m", CONFIG | {"max_position_embeddings": 1000})
    quantize(tmp_path / "m", tmp_path / "out", preset="fast", quiet=True)
    assert main([str(tmp_path / "out"), "--gpu-memory", "24"]) == 0
    out = capsys.readouterr().out
    assert "--max-model-len 960 " in out and "positions" not in out


def test_not_a_checkpoint(tmp_path, capsys) -> None:
    assert main([str(tmp_path), "--gpu-memory", "24"]) == 2
    assert "config.json" in capsys.readouterr().err


def test_sizes_of_the_300b() -> None:
    """The published figures: 94 GB on one card, 221184 bytes of cache a token."""
    config = read_config(ROOT / "examples/configs/ernie-4.5-300b-a47b")
    one = card_memory(build_plan(config), 140 * GIB, 128)
    assert 93e9 < one.weights < 95e9
    assert one.token_cache == 2 * 2 * 8 * 128 * 54
    assert one.sequences(32768) >= 4
    two = card_memory(build_plan(config, tensor_parallel_size=2), 80 * GIB, 128)
    assert two.token_cache * 2 == one.token_cache
    assert two.libraries > one.libraries and two.sequences(32768) >= 4
    assert card_memory(build_plan(config), 80 * GIB, 128).cache < 0


def test_a_tied_head_is_held_twice() -> None:
    config = read_config(ROOT / "examples/configs/ernie-4.5-21b-a3b")
    plan = build_plan(config)
    assert weight_bytes(plan) - plan.output_bytes == 2 * 103424 * 2560


def test_versions() -> None:
    assert find_release("2.5.0+cu126").name == "2.5"
    assert find_release("v2.6").most_sequences == 512
    for text in ("", "2", "2.50", "2.5.0.dev0", "2.3.0-dev", "devel", "3.1"):
        with pytest.raises(CcqError):
            find_release(text)


@pytest.mark.parametrize(
    "text",
    ["develop", "dev", "2.6.0-dev", "2.6.0.dev0", "v2.6.0-dev+cu126", "2.6-dev", "2.7.0dev1"],
)
def test_builds_of_develop_are_a_line_of_their_own(text) -> None:
    assert find_release(text).name == "develop"
    assert find_release("2.6.0").name == find_release("2.6.0+dev").name == "2.6"


def test_on_develop_only_the_plugin_runs_wint2(made, capsys) -> None:
    develop = replace(SERVE, release=RELEASES["develop"], workers=1)
    result = check(made[1], develop)
    assert result.good and result.environment == {"FD_PLUGINS": "paddle_ccq"}
    (warning,) = result.warnings
    assert "5e54770b" in warning and "FD_PLUGINS=paddle_ccq" in warning and "only so" in warning
    assert check(made[1], replace(develop, plugin=True)).warnings == []
    assert "only so" in only_problem(made[1], replace(develop, plugin=False))
    assert check(made[1], SERVE).environment == {}
    arguments = [str(made[1]), "--gpu-memory", "24", "--fastdeploy-version", "2.6.0-dev"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "FD_PLUGINS=paddle_ccq python -m fastdeploy" in out and "FastDeploy develop" in out
    assert main([*arguments, "--plugin"]) == 0
    assert "warning" not in capsys.readouterr().out


def test_dense_checkpoints_need_no_plugin_on_develop(tmp_path, made) -> None:
    write_checkpoint(tmp_path / "m", {**CONFIG, "moe_num_experts": 0})
    quantize(tmp_path / "m", tmp_path / "out", quiet=True)
    result = check(tmp_path / "out", replace(SERVE, release=RELEASES["develop"], workers=1))
    assert result.good and result.warnings == [] and result.environment == {}
    assert "--load-choices" in result.command
    # The card's command, too: without it FastDeploy's other loader fails on a dense checkpoint.
    for folder in (tmp_path / "out", made[1]):
        assert "    --load-choices default\n```" in (folder / "README.md").read_text("utf-8")


def test_the_command_states_what_releases_choose_differently(made) -> None:
    for name, workers, requests in (("2.5", "1", "512"), ("2.6", "4", "2048")):
        result = check(made[1], replace(SERVE, release=RELEASES[name]))
        assert result.command[result.command.index("--workers") + 1] == workers
        assert result.command[result.command.index("--max-concurrency") + 1] == requests
        assert ("starts 4 API processes" in " ".join(result.warnings)) == (name == "2.6")
    few = check(made[1], replace(SERVE, concurrency=64))
    assert few.good and "--max-num-seqs 128 is never reached" in few.warnings[0]


@pytest.mark.parametrize("release", ["2.4", "2.5", "2.6", "develop"])
@pytest.mark.parametrize(
    ("length", "near"), [(1000, "960 or 1024"), (63, "take 64"), (32767, "32768")]
)
def test_lengths_that_the_block_size_does_not_divide(made, release, length, near) -> None:
    serve = replace(SERVE, release=RELEASES[release], max_model_len=length)
    with pytest.raises(CcqError, match=rf"--max-model-len {length}: .* block size, 64, .*{near}"):
        check(made[1], serve)
    assert check(made[1], replace(SERVE, release=RELEASES["2.3"], max_model_len=1000)).good
    assert check(made[1], replace(serve, max_model_len=1008, block_size=16)).good


def test_draft_tokens_count_from_2_6_on(made) -> None:
    serve = replace(SERVE, max_num_batched_tokens=512, draft_tokens=4)
    assert check(made[1], serve).good
    for name in ("2.6", "develop"):
        with pytest.raises(CcqError, match=r"wants 640 to .* 5 tokens a step for each"):
            check(made[1], replace(serve, release=RELEASES[name]))


@pytest.mark.parametrize("name", ["tokenizer.model", "spm.model", "ernie_token_100k.model"])
def test_fastdeploy_reads_sentencepiece_alone(copy, name) -> None:
    (copy / "tokenizer.model").unlink()
    (copy / "ccq-manifest.json").unlink()
    text = only_problem(copy, SERVE)
    assert "tokenizer.model, spm.model or ernie_token_100k.model" in text
    assert "does not read tokenizer.json" in text
    (copy / name).write_bytes(b"spm")
    assert check(copy, SERVE).good


def test_flags_by_release() -> None:
    assert "router" not in known_flags(RELEASES["2.3"])
    assert "innode_prefill_ports" not in known_flags(RELEASES["2.4"])
    assert known_flags(RELEASES["2.5"])["lm_head_fp32"] == "lm_head-fp32"
    assert known_flags(RELEASES["2.1"]) == {}
    assert "write_through_threshold" in known_flags(RELEASES["develop"])
    assert "write_through_threshold" not in known_flags(RELEASES["2.6"])
    assert "enable_keep_sampling_mask" not in known_flags(RELEASES["develop"])
    settings = {
        "enable_prefix_caching": False,
        "enable_mm": False,
        "seed": None,
        "graph_optimization_config": {"use_cudagraph": True},
        "ips": ["a", "b"],
    }
    assert arguments(settings, RELEASES["2.5"]) == [
        "--no-enable-prefix-caching",
        "--graph-optimization-config",
        '{"use_cudagraph":true}',
        "--ips",
        "a,b",
    ]
    with pytest.raises(CcqError, match=r"use_cudagraph: FastDeploy .* has no such flag"):
        arguments({"use_cudagraph": True}, RELEASES["2.5"])
    assert list(four_ports(9000).values()) == [9000, 9001, 9002, 9003]


def test_what_nvidia_smi_says() -> None:
    cards = parse_cards("NVIDIA H20, 143771, 9.0\nTesla T4, 15360, 7.5\nbroken line\n")
    assert [card.too_old for card in cards] == [False, True]
    assert round(cards[0].memory / GIB, 1) == 140.4


def test_this_machine(monkeypatch, tmp_path) -> None:
    cards = parse_cards("NVIDIA H20, 143771, 9.0\nTesla T4, 15360, 7.5\n")
    monkeypatch.setattr(check_module, "available_memory", lambda: 5)
    result = CheckResult("x", host_bytes=10)
    judge_machine(result, [], 4)
    assert not result.problems and not result.warnings
    judge_machine(result, cards, 3)
    assert [p.split(":")[0] for p in result.problems] == [
        "cards on this machine",
        "Tesla T4",
    ]
    assert len(result.warnings) == 1
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4 kB\n")
    assert available_memory(tmp_path / "meminfo") == 4096
    assert available_memory(tmp_path / "none") is None


def test_cards_instead_of_a_number(made, monkeypatch, capsys) -> None:
    cards = parse_cards("NVIDIA L4, 23034, 8.9\n")
    monkeypatch.setattr(check_module, "find_cards", lambda: cards)
    assert main([str(made[1])]) == 0
    assert "22.5 GiB" in capsys.readouterr().out
    assert main([str(made[2]), "--tensor-parallel-size", "2"]) == 1
    assert "cards on this machine: 1, needed: 2" in capsys.readouterr().out
