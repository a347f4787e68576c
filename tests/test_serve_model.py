# SPDX-License-Identifier: Apache-2.0
"""The engine's model is the evaluated one for every shape of network and every stored format."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("paddle")

import paddle

from helpers.synthetic import tiny_config, write_checkpoint
from paddle_ccq.checkpoint.reader import open_checkpoint
from paddle_ccq.families.ernie45 import ErnieConfig
from paddle_ccq.models.ernie import Ernie
from paddle_ccq.models.weights import ExactWeights
from paddle_ccq.quantize import quantize
from paddle_ccq.serving.engine_model import EngineModel, Piece

TOKENS = [1, *np.random.default_rng(0).integers(3, 259, 168).tolist()]


def check(folder: Path, packed: bool) -> EngineModel:
    """Logits after a prompt in three pieces, beside another sequence, are the float model's.

    And to the bit those of the whole prompt alone.
    """
    checkpoint = open_checkpoint(folder)
    model = EngineModel(checkpoint, threads=1)
    assert any(layer.experts and layer.experts.packed for layer in model.layers) == packed
    reference = Ernie(ExactWeights(checkpoint))
    hidden = reference.hidden_states(paddle.to_tensor([TOKENS]))
    wanted = reference.logits(hidden)[0].numpy()
    cache = model.new_cache(300)
    cache.allocate(7)  # so that the region does not begin at 0
    region, other = cache.allocate(len(TOKENS)), cache.allocate(40)
    cuts = [0, 3, len(TOKENS) - 1, len(TOKENS)]
    for first, last in pairwise(cuts):
        beside = Piece(TOKENS[first : first + 5], first % 30, other, wants_logits=False)
        pieces = [Piece(TOKENS[first:last], first, region), beside]
        found = model.forward(pieces, cache)
        assert found.shape == (1, checkpoint.config.vocab_size)
        error = np.linalg.norm(found[0] - wanted[last - 1])
        assert error < 1e-5 * np.linalg.norm(wanted[last - 1])
    fresh = model.new_cache(300)
    alone = model.forward([Piece(TOKENS, 0, fresh.allocate(len(TOKENS)))], fresh)
    assert np.array_equal(alone, found)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_num_shared_experts": 2, "tie_word_embeddings": False},
        {"moe_num_shared_experts": 0, "moe_k": 4},
        {"moe_layer_interval": 2},
        {"moe_num_experts": 0},
        {"num_key_value_heads": 4, "vocab_size": 259 + 2},
        {"num_nextn_predict_layers": 1},
    ],
    ids=str,
)
def test_shapes_of_networks(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_checkpoint(tmp_path, tiny_config(**changes))
    check(tmp_path, packed=False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fastdeploy_layout": "2.0"},
        {"format": "ccq-2t"},
        {"format": "ccq-2.5"},
        {"format": "ccq-2.75"},
        {"wint4_end_layer": 1},
        {"rules": "wint4 in the last layer only", "allow_plugin_layout": True},
    ],
    ids=str,
)
def test_stored_formats(tmp_path: Path, options: dict[str, Any]) -> None:
    write_checkpoint(tmp_path / "float", tiny_config())
    if "rules" in options:
        options = {**options, "rules": tmp_path / "rules.yaml"}
        options["rules"].write_text('- {match: "*.layers.2.mlp.experts.*", format: wint4}\n')
    quantize(tmp_path / "float", tmp_path / "packed", preset="fast", quiet=True, **options)
    model = check(tmp_path / "packed", packed=True)
    weights = 4 * 3 * 128 * 128  # of one MoE layer's experts
    wint4 = 1 if "wint4_end_layer" in options or "rules" in options else 0
    # No weight is held as a float: codes, and what is stored once a column.
    columns = 4 * (2 * 128 + 128) * 12
    assert model.expert_bytes <= weights * (2.75 * (2 - wint4) + 4 * wint4) / 8 + 2 * columns
    dense = sum(np.prod(shape) for shape in dense_shapes(model.config).values())
    assert model.dense_bytes < 1.1 * dense + 2 * model.config.vocab_size * 128 + 3 * 4 * 4 * 128


def test_hugging_faces_layout(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "float", tiny_config())
    options = {"target": "huggingface", "preset": "fast", "quiet": True}
    quantize(tmp_path / "float", tmp_path / "packed", **options)
    check(tmp_path / "packed", packed=True)


def dense_shapes(config: ErnieConfig) -> dict[str, tuple[int, ...]]:
    shapes = config.tensors.shapes
    return {n: s for n, s in shapes.items() if "_proj." in n and ".experts." not in n}
