# SPDX-License-Identifier: Apache-2.0
"""Canonical names map onto both layouts without losing or doubling a column."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import random_weights, stored_weights, tiny_config

from paddle_ccq.checkpoint import naming
from paddle_ccq.checkpoint.config import ErnieConfig
from paddle_ccq.errors import CcqError

CONFIG = tiny_config(tie_word_embeddings=False, num_key_value_heads=1)


@pytest.mark.parametrize("layout", naming.LAYOUTS)
def test_storage_matches_an_independent_statement_of_the_layout(layout):
    config = ErnieConfig.from_json(CONFIG)
    weights = random_weights(CONFIG)
    stored = stored_weights(CONFIG, weights, layout, "f32")
    seen = set()
    for name, shape in config.canonical_shapes().items():
        storage = naming.storage(config, name, shape, layout)
        for part in storage.parts:
            values = stored[part.name]
            assert values.shape == part.shape
            whole = weights[name]
            expected = whole[:, part.columns].T if storage.transposed else whole
            np.testing.assert_array_equal(values, expected)
            seen.add(part.name)
        if storage.transposed:
            columns = [c for p in storage.parts for c in range(shape[1])[p.columns]]
            assert columns == list(range(shape[1]))
    assert seen == set(stored)


def test_kinds_of_names():
    kinds = {
        "ernie.layers.3.mlp.experts.0.up_gate_proj.weight": (True, True),
        "ernie.layers.3.mlp.shared_experts.down_proj.weight": (True, False),
        "ernie.layers.0.self_attn.o_proj.weight": (True, False),
        "ernie.layers.3.mlp.gate.weight": (False, False),
        "ernie.embed_tokens.weight": (False, False),
        "lm_head.weight": (False, False),
    }
    for name, kind in kinds.items():
        assert (naming.is_linear(name), naming.is_expert(name)) == kind


@pytest.mark.parametrize(
    ("name", "mtp"),
    [
        ("ernie.mtp_emb_norm.0.weight", True),
        ("model.mtp_block.0.self_attn.q_proj.weight", True),
        ("mtp.layers.0.weight", True),
        ("ernie.layers.0.self_attn.o_proj.weight", False),
        ("model.layers.0.mtpx.weight", False),
    ],
)
def test_multi_token_prediction_names(name, mtp):
    assert naming.is_mtp(name) is mtp


def test_detect_layout():
    assert naming.detect_layout(["lm_head.weight", "model.norm.weight"], "x") == "pt"
    assert naming.detect_layout(["ernie.norm.weight"], "x") == "paddle"
    with pytest.raises(CcqError, match=r"^x: tensors of two layouts, such as 'model.norm"):
        naming.detect_layout(["ernie.norm.weight", "model.norm.weight"], "x")
    with pytest.raises(CcqError, match="no tensor is named like an ERNIE"):
        naming.detect_layout(["transformer.h.0.weight", "model.mtp_norm.weight"], "x")
