# SPDX-License-Identifier: Apache-2.0
"""What dequantize writes is, to transformers' own classes, the model that was read.

Only where transformers and torch are installed.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from helpers import reference_ernie
from helpers.synthetic import random_weights, stored_weights, tiny_config, write_tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from paddle_ccq.dequantize import dequantize  # noqa: E402

TOKENS = [1, 5, 9, 200, 17, 44]
EMBEDDING, HEAD = "ernie.embed_tokens.weight", "lm_head.weight"


def write(folder: Path, config: dict, weights: dict[str, np.ndarray], layout: str) -> None:
    folder.mkdir()
    with_all = {**tiny_config(), **config}
    write_tensors(folder, stored_weights(with_all, weights, layout, "bf16"), shards=2)
    stated = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps({**stated, "dtype": "bfloat16"}))


def transformers_logits(folder: Path) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.parametrize("layout", ["pt", "paddle"])
@pytest.mark.parametrize(
    ("flag", "head", "tied"),
    [
        (True, None, True),
        (True, "equal", True),
        (False, "different", False),
        (..., None, True),
        (..., "equal", False),
        (..., "different", False),
    ],
)
def test_the_head_is_the_one_that_was_stored(tmp_path, layout, flag, head, tied):
    config = tiny_config(tie_word_embeddings=False)
    weights = random_weights(config)
    if head == "equal":
        weights[HEAD] = np.ascontiguousarray(weights[EMBEDDING].T)
    elif head is None:
        del weights[HEAD]
    compare(tmp_path, {**config, "tie_word_embeddings": flag}, weights, layout, tied=tied)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": ..., "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
        {"moe_num_shared_experts": 0},
        {"moe_layer_start_index": 0},
        {"moe_k": ..., "num_experts_per_tok": 1},
        {"moe_num_experts": 0},
        {"moe_num_experts": 0, "model_type": "ernie4_5_moe"},
    ],
    ids=str,
)
def test_values_that_loaders_have_other_defaults_for(tmp_path, changes):
    config = {**tiny_config(moe_num_experts=changes.get("moe_num_experts", 4)), **changes}
    weights = random_weights(config)
    if config["moe_num_shared_experts"] == 0:
        config["moe_num_shared_experts"] = ...  # what is 0 may be left out
    compare(tmp_path, config, weights, "paddle", tied=True)


def compare(tmp_path, config: dict, weights: dict, layout: str, tied: bool) -> None:
    write(tmp_path / "m", config, weights, layout)
    full = {**tiny_config(), **{k: v for k, v in config.items() if v is not ...}}
    full["tie_word_embeddings"] = tied
    if config.get("num_experts_per_tok"):
        full["moe_k"] = config["num_experts_per_tok"]
    if config.get("rope_parameters"):
        full["rope_theta"] = config["rope_parameters"]["rope_theta"]
    if config.get("moe_num_shared_experts") is ...:
        full["moe_num_shared_experts"] = 0
    stored = stored_weights(full, weights, "paddle", "bf16")
    rounded = {name: stored[name].astype(np.float32) for name in weights}
    expected = reference_ernie.logits(full, rounded, TOKENS)
    written = dequantize(tmp_path / "m", tmp_path / "out", "pt")
    np.testing.assert_allclose(transformers_logits(written), expected, atol=2e-3)
