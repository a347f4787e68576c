# SPDX-License-Identifier: Apache-2.0
"""The card's metadata: carried over from the source's card, valid for hubs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.checkpoint.source import hub_id
from paddle_ccq.checkpoint.source_card import read_source_card
from paddle_ccq.quantize import main, quantize

CONFIG = tiny_config(num_hidden_layers=1, moe_num_experts=2, moe_layer_start_index=0)
APACHE = (
    "\n                                 Apache License\n                           Version 2.0\n"
)


@pytest.fixture
def model(tmp_path) -> Path:
    write_checkpoint(tmp_path / "m", CONFIG)
    return tmp_path / "m"


def card_of(model: Path, output: Path) -> dict[str, Any]:
    """The metadata of the output's card, by a YAML parser and by the hub's library."""
    quantize(model, output, preset="fast", quiet=True)
    text = (output / "README.md").read_text("utf-8")
    metadata = yaml.safe_load(text.split("---\n")[1])
    hub = pytest.importorskip("huggingface_hub")
    parsed = hub.ModelCard(text).data.to_dict()
    assert parsed == metadata
    return metadata


def test_a_local_source(model, tmp_path):
    source = {
        "license": "apache-2.0",
        "language": ["en", "zh"],
        "pipeline_tag": "text-generation",
        "base_model": ["baidu/ERNIE-4.5-21B-A3B-Base-PT"],
        "library_name": "transformers",
        "tags": ["ERNIE4.5"],
        "datasets": ["a/b"],
    }
    (model / "README.md").write_text(
        f"---\n{yaml.safe_dump(source)}---\n\n# Model\n---\nx: y\n---\n"
    )
    card = card_of(model, tmp_path / "out")
    for key in ("license", "language", "pipeline_tag", "base_model"):
        assert card[key] == source[key]
    assert card["library_name"] == "PaddlePaddle"  # what loads the output
    assert "datasets" not in card and "base_model_relation" not in card


@pytest.mark.parametrize(
    ("positions", "length"), [(131072, 32768), (2048, 2048), (1000, 960), (32, 64)]
)
def test_the_command_of_the_card_stays_within_the_model(tmp_path, positions, length):
    write_checkpoint(tmp_path / "m", CONFIG | {"max_position_embeddings": positions})
    quantize(tmp_path / "m", tmp_path / "out", preset="fast", quiet=True)
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert f"--max-model-len {length} " in text and "vllm serve .\n" in text


def test_rank_folders_say_how_many_cards_vllm_needs(tmp_path):
    write_checkpoint(tmp_path / "m", CONFIG | {"moe_intermediate_size": 256})
    quantize(tmp_path / "m", tmp_path / "out", preset="fast", quiet=True, tensor_parallel_size=2)
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "vllm serve . --tensor-parallel-size 2\n" in text and "cut at load" not in text


@pytest.mark.parametrize("target", ["fastdeploy", "huggingface"])
def test_sizes_that_vllm_cannot_serve_are_said(tmp_path, target, capsys):
    write_checkpoint(tmp_path / "m", CONFIG | {"hidden_size": 192, "head_dim": 48})
    options = ["--output", str(tmp_path / "out"), "--format", "ccq-2.5", "--target", target]
    assert main(["--model", str(tmp_path / "m"), "--preset", "fast", *options]) == 0
    said = "hidden size 192: our kernels in vLLM need a multiple of 128"
    assert said in capsys.readouterr().err
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert said in text and "vllm serve" not in text


def test_a_cached_source_is_itself_the_base(model, tmp_path):
    snapshot = tmp_path / "models--baidu--ERNIE-X" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    (snapshot / "README.md").write_text("---\nbase_model: baidu/ERNIE-X-Base\nlicense: mit\n---\n")
    card = card_of(snapshot, tmp_path / "out")
    assert card["base_model"] == "baidu/ERNIE-X"
    assert card["base_model_relation"] == "quantized"
    assert card["license"] == "mit"


@pytest.mark.parametrize(
    "card", [None, "# no metadata\n", "---\n- a\n- b\n---\n", "---\nunclosed: 1\n"]
)
def test_sources_without_metadata(model, tmp_path, capsys, card):
    if card is not None:
        (model / "README.md").write_text(card)
    flags = ["--model", str(model), "--output", str(tmp_path / "said"), "--preset", "fast"]
    assert main(flags) == 0
    assert "before you publish it" in capsys.readouterr().err
    found = card_of(model, tmp_path / "out")
    assert found["pipeline_tag"] == "text-generation"
    assert not {"license", "language", "base_model"} & found.keys()


def test_a_licence_file_states_the_licence(model, tmp_path):
    (model / "LICENSE").write_text(APACHE)
    assert card_of(model, tmp_path / "a")["license"] == "apache-2.0"
    (model / "LICENSE").write_text("All rights reserved; not the Apache License.")
    assert "license" not in card_of(model, tmp_path / "b")


def test_other_licences_keep_name_and_link(model):
    head = "license: other\nlicense_name: my terms\nlicense_link: "
    for link, present in (("https://a.b/c", True), ("TERMS.txt", False), ("LICENSE", True)):
        (model / "README.md").write_text(f"---\n{head}{link}\n---\n")
        (model / "LICENSE").write_text("terms")
        found, messages = read_source_card(model)
        assert found["license"] == "other" and found["license_name"] == "my terms"
        assert found.get("license_link") == (link if present else None)
        assert messages == []


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("language: no", "language", "no"),  # false, to YAML
        ("language: [no, en]", "language", ["no", "en"]),
        ("language: [en, [zh]]", "language", None),
        ("language: english text", "language", None),
        ("license: {a: b}", "license", None),
        ('license: "a\\nb: c"', "license", None),
        ("license: 2.0", "license", None),
        ("base_model: ../../etc", "base_model", None),
        ("base_model: a/b/c", "base_model", None),
        ("pipeline_tag: [x y]", "pipeline_tag", None),
    ],
)
def test_odd_values_are_kept_out_with_a_message(model, tmp_path, text, key, value):
    (model / "README.md").write_text(f"---\n{text}\n---\n")
    found, messages = read_source_card(model)
    assert found.get(key) == value
    assert any(key in message for message in messages) or value is not None
    card_of(model, tmp_path / "out")


@pytest.mark.parametrize(
    "data", [b"---\na: [\n---\n", b"---\na: \xff\xfe\n---\n", b"---\na: !!python/x y\n---\n"]
)
def test_broken_cards_are_no_obstacle(model, tmp_path, data):
    (model / "README.md").write_bytes(data)
    card_of(model, tmp_path / "out")


@pytest.mark.parametrize("start", ["\ufeff", "", "\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_cards_of_other_systems(model, start, end):
    text = f"{start}---\nlicense: mit\n---\n# Title\n".replace("\n", end)
    (model / "README.md").write_bytes(text.encode())
    assert read_source_card(model)[0] == {"license": "mit"}


def test_hub_ids(tmp_path):
    assert (
        hub_id("PaddlePaddle/ERNIE-4.5-21B-A3B-Paddle") == "PaddlePaddle/ERNIE-4.5-21B-A3B-Paddle"
    )
    assert hub_id("ERNIE-4.5-21B") == "baidu/ERNIE-4.5-21B-A3B-Paddle"
    (tmp_path / "ERNIE-4.5-21B").mkdir()
    assert hub_id(tmp_path / "ERNIE-4.5-21B") is None
