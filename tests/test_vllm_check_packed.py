# SPDX-License-Identifier: Apache-2.0
"""The check before vLLM loads a checkpoint in Hugging Face's layout; without vLLM."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from helpers import family_models
from paddle_ccq.engine_check import GIB
from paddle_ccq.errors import CcqError
from paddle_ccq.quantize import quantize
from paddle_ccq.vllm.check import ServeConfig, check, main
from paddle_ccq.vllm.claims import Parallel

SERVE = ServeConfig(card_bytes=24 * GIB)


def made(tmp_path: Path, name: str, **options: object) -> Path:
    case = family_models.by_name(name)
    source = tmp_path / "source"
    family_models.write_source(source, case.config, family_models.random_tensors(case))
    quantize(source, tmp_path / "packed", preset="fast", quiet=True, **options)
    return tmp_path / "packed"


def of_weights(folder: Path) -> int:
    """Bytes of all shards but their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    return total


def expert_columns(folder: Path) -> int:
    """Columns of all packed matrices."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                if name.endswith(".super_scales"):
                    total += file.get_slice(name).get_shape()[0]
    return total


@pytest.mark.parametrize(
    "name,cache",
    [
        ("deepseek-v3", 2 * 2 * (32 + 16)),  # layers, bytes, latent and rotary values
        ("qwen3-moe", 2 * 2 * 2 * 2 * 48),  # layers, bytes, keys and values, heads
        ("glm-4.5", 2 * 2 * 2 * 2 * 32),
        ("minimax-m2", 2 * 2 * 2 * 2 * 32),
        ("qwen3.5-moe-vision", 1 * 2 * 2 * 2 * 32),  # the other layer has linear attention
    ],
)
def test_a_card_holds_the_whole_checkpoint_and_its_cache(
    name: str, cache: int, tmp_path: Path, capsys
) -> None:
    folder = made(tmp_path, name, drop_mtp=True)
    assert main([str(folder), "--gpu-memory", "24"]) == 0
    assert f"good: {folder} for vLLM" in capsys.readouterr().out
    memory = check(folder, SERVE).memory
    assert memory is not None
    # On the card a column of an expert has 16 bytes of scales and constants, in the file 10.
    assert memory.weights == of_weights(folder) + 6 * expert_columns(folder)
    assert memory.token_cache == cache


def test_layers_for_prediction_are_not_loaded(tmp_path: Path) -> None:
    from paddle_ccq.families.registry import read_config

    case = family_models.by_name("glm-4.5")
    tensors = family_models.random_tensors(case)
    # The same layer once more, as the one for prediction, and what that one has besides.
    prefix = "model.layers.1."
    found = {n.replace(prefix, "model.layers.2."): v for n, v in tensors.items() if prefix in n}
    for tensor in read_config(case.config).tensors.values():
        for part in tensor.sources["pt"].parts:
            if part.name.startswith("model.layers.2.") and not tensor.optional:
                found.setdefault(part.name, np.ones(part.shape, np.float32))
    family_models.write_source(tmp_path / "source", case.config, tensors | found)
    quantize(tmp_path / "source", tmp_path / "packed", preset="fast", quiet=True)
    memory = check(tmp_path / "packed", SERVE).memory
    assert memory is not None and memory.weights < 0.8 * of_weights(tmp_path / "packed")


def test_cards_share_experts_as_wholes_or_in_parts(tmp_path: Path) -> None:
    folder = made(tmp_path, "qwen3-moe")
    with pytest.raises(CcqError, match=r"sizes that work: 1; 2 with --enable-expert-parallel$"):
        check(folder, replace(SERVE, parallel=Parallel(2)))
    both = check(folder, replace(SERVE, parallel=Parallel(2, experts=True)))
    assert both.good and both.memory is not None
    assert both.memory.weights < 0.7 * of_weights(folder)
    with pytest.raises(CcqError, match=r"can't be shared out evenly; sizes that work: 1, 2, 4$"):
        check(folder, replace(SERVE, parallel=Parallel(3, experts=True)))


def test_every_format_and_a_missing_file(tmp_path: Path) -> None:
    folder = made(tmp_path, "minimax-m2", format="ccq-2t")
    assert check(folder, SERVE).good
    next(folder.glob("*.safetensors")).unlink()
    found = check(folder, SERVE)
    assert len([p for p in found.problems if p.endswith(": missing")]) == 1


def test_ernie_in_this_layout(tmp_path: Path, tiny_model) -> None:
    from helpers.configs import tiny_config

    config = tiny_config(tie_word_embeddings=False, max_position_embeddings=65536)
    source = tiny_model(config)
    quantize(source, tmp_path / "packed", preset="fast", quiet=True, target="huggingface")
    found = check(tmp_path / "packed", SERVE)
    assert found.good and found.memory is not None


@pytest.mark.parametrize("name", ["ernie-4.5-vl", "unknown"])
def test_an_architecture_that_vllm_does_not_serve_is_a_problem(name: str, tmp_path: Path) -> None:
    if name == "unknown":
        case = family_models.by_name("minimax-m2")
        source = tmp_path / "source"
        config = case.config | {"architectures": ["OtherForCausalLM"], "model_type": "other"}
        family_models.write_source(source, config, family_models.random_tensors(case))
        quantize(source, tmp_path / "packed", preset="fast", quiet=True, family="generic")
    else:
        made(tmp_path, name)
    found = check(tmp_path / "packed", SERVE)
    architecture = json.loads((tmp_path / "packed" / "config.json").read_text())["architectures"][0]
    about = [p for p in found.problems if architecture in p]
    assert len(about) == 1 and not found.good and found.memory is None
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "vllm serve" not in card and "library_name: vllm" not in card
    assert architecture in card and "paddle_ccq.dequantize" in card


def test_what_the_structure_refuses(tmp_path: Path) -> None:
    folder = made(tmp_path, "qwen3-moe")
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    content = json.loads((copy / "config.json").read_text())
    content["quantization_config"]["row_order"] = "fastdeploy-2.1"
    (copy / "config.json").write_text(json.dumps(content))
    assert any("row_order" in problem for problem in check(copy, SERVE).problems)
    content["quantization_config"]["version"] = 9
    (copy / "config.json").write_text(json.dumps(content))
    with pytest.raises(CcqError, match="version: 9"):
        check(copy, SERVE)


@pytest.mark.parametrize("kind,refused", [(None, True), ("default", True), ("yarn", False)])
def test_a_length_beyond_the_positions(kind: str | None, refused: bool, tmp_path: Path) -> None:
    """With scaled rotary positions it is the engine's release that says how much is allowed."""
    folder = made(tmp_path, "qwen3-moe")
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 4096
    if kind is not None:
        config["rope_scaling"] = {"rope_type": kind, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "ccq-manifest.json").unlink()
    found = check(folder, replace(SERVE, max_model_len=4097))
    said = found.problems if refused else found.warnings
    assert [text for text in said if "max_position_embeddings of the model is 4096" in text]
    assert found.good is not refused


@pytest.mark.parametrize("tied", [False, True])
def test_pipelines_of_ernie_in_this_layout(tied: bool, tmp_path: Path, tiny_model) -> None:
    from helpers.configs import tiny_config

    config = tiny_config(tie_word_embeddings=tied, max_position_embeddings=65536)
    quantize(
        tiny_model(config), tmp_path / "packed", preset="fast", quiet=True, target="huggingface"
    )
    two = replace(SERVE, parallel=Parallel(pipeline=2))
    if tied:
        with pytest.raises(CcqError, match="head that is tied to the embedding"):
            check(tmp_path / "packed", two)
        return
    assert check(tmp_path / "packed", two).good
    with pytest.raises(CcqError, match="size 4: the model has 3 layers"):
        check(tmp_path / "packed", replace(SERVE, parallel=Parallel(pipeline=4)))
