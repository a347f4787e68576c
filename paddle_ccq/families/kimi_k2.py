# SPDX-License-Identifier: Apache-2.0
"""Kimi-K2: DeepSeek-V3's tensors under another model_type, in FP8 or, since K2-Thinking, INT4."""

from __future__ import annotations

from .common import Layout, make_family
from .deepseek_v3 import KEYS, layer, sparse

FAMILY = make_family(
    "Kimi-K2",
    ["DeepseekV3ForCausalLM"],
    Layout(layer, sparse),
    keys=KEYS,
    model_types=["kimi_k2"],
)
