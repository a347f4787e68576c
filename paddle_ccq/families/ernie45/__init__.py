# SPDX-License-Identifier: Apache-2.0
"""The family ERNIE-4.5: its config.json with its oddities, its two namings, its tensors."""

from __future__ import annotations

from ..family import Family
from .config import ErnieConfig, parse
from .config_checks import ARCHITECTURES
from .tensors import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    PADDLE,
    PT,
    head_name,
    is_mtp,
    rotary_frequencies,
    tensors,
    why_unexpected,
)

__all__ = [
    "EMBEDDING",
    "ERNIE45",
    "FAMILY",
    "FINAL_NORM",
    "HEAD",
    "PADDLE",
    "PT",
    "ErnieConfig",
    "head_name",
]

# The published 54-layer recipe keeps MoE layers up to 6 at wint4. On a measured 10-layer model a
# wint4 prefix bought 4 % of KL for 0.22 bits per weight, so smaller models get none.
PREFIX_MIN_LAYERS = 40
PUBLISHED_WINT4_END_LAYER = 6


def default_wint4_end_layer(config: ErnieConfig) -> int:
    """The published prefix for models of the 300B's depth, none for smaller ones."""
    deep = config.num_hidden_layers >= PREFIX_MIN_LAYERS
    return PUBLISHED_WINT4_END_LAYER if deep else -1


ERNIE45 = FAMILY = Family(
    "ERNIE-4.5",
    ARCHITECTURES,
    (PT, PADDLE),
    parse=parse,
    tensors=tensors,
    embedding=lambda _: EMBEDDING,
    head=HEAD,
    examples="model.layers.* in -PT, ernie.layers.* in -Paddle checkpoints",
    is_mtp=is_mtp,
    table=rotary_frequencies,
    why_unexpected=why_unexpected,
    wint4_end_layer=default_wint4_end_layer,
)
