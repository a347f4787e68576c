# SPDX-License-Identifier: Apache-2.0
"""Configs of tiny models that several files need."""

from __future__ import annotations

from helpers.synthetic import tiny_config

_SMALL = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 32}
# Tied and untied heads, one key head for several query heads, with and without a shared expert.
TIED_AND_UNTIED = [
    tiny_config(**_SMALL),
    tiny_config(**_SMALL, tie_word_embeddings=False, moe_num_shared_experts=0, moe_k=3),
]
# Experts wide enough for the calibrated search, and few of them.
CALIBRATED = tiny_config(num_hidden_layers=3, moe_num_experts=2, moe_k=1, moe_intermediate_size=256)
