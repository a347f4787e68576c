# SPDX-License-Identifier: Apache-2.0
"""README.md of an output in Hugging Face's naming."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...checkpoint.plan import Plan
from ...checkpoint.sources.scheme import SourceScheme
from ...units import gigabytes
from .. import card
from ..recipe import Recipe
from .config import is_served

UNQUANTIZED = "Only the routed experts are packed; everything else is the source's, byte for byte."


def model_card(plan: Plan, recipe: Recipe, records: Sequence[dict[str, Any]]) -> str:
    """The text of the card; depends on plan, recipe and errors alone, never on time or place."""
    kept = sum(planned.rank_bytes for planned in plan.tensors if not planned.quantized)
    method = SourceScheme.read(plan.config.raw, "config.json").method
    stored = f", stored as {method} where the source has it so" if method else ""
    own = [
        ("everything else", f"{gigabytes(kept)}, as in the source{stored}"),
        ("family", plan.config.family.name),
    ]
    if any(planned.layer in plan.config.prediction_layers for planned in plan.tensors):
        own.append(("layers for multi-token prediction", "kept"))
    served = is_served(plan.config)
    library = "vllm" if served else "paddle-ccq"
    sections = [
        card.metadata(recipe, library, ["ccq", "quantization", *_tags(plan)]),
        card.summary(plan, recipe, own, UNQUANTIZED),
        card.errors(plan, records),
        "\n".join(["## Check", "", "```", "python -m paddle_ccq.verify .", "```"]),
        "\n".join(card.vllm(plan.config) if served else _floats(plan)),
    ]
    return "\n\n".join(sections) + "\n"


def _floats(plan: Plan) -> list[str]:
    """What to do with a model that no engine serves with packed experts."""
    name = next(iter(plan.config.architectures), "this model")
    return [
        "## Use",
        "",
        f"No engine serves {name} with packed experts yet. To get floats again, which transformers"
        " and others load:",
        "",
        "```",
        "python -m paddle_ccq.dequantize . --output ../FLOAT",
        "```",
    ]


def _tags(plan: Plan) -> list[str]:
    return [plan.config.model_type] if plan.config.model_type else []
