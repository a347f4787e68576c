# SPDX-License-Identifier: Apache-2.0
"""config.json of an output in Hugging Face's naming: the source's, and what is packed how."""

from __future__ import annotations

from typing import Any

from ...checkpoint.plan import Plan
from ...checkpoint.reader import PROVENANCE_KEY
from ...checkpoint.sources.scheme import KEYS, SOURCE_KEY, stated_entries, without_entries
from ...families.config import CCQ, CCQ_VERSION, ModelConfig
from ...version import __version__
from .layout import expert_modules

QUANTIZATION = KEYS[0]
# Of the entry's structure.
VERSION = CCQ_VERSION
# Those that vLLM serves with our plugin (vllm/packed_models.py, vllm/plugin.py).
VLLM_ARCHITECTURES = (
    "DeepseekV3ForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "Glm4MoeForCausalLM",
    "MiniMaxM2ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
)
# They name code, which is not copied, or files of the source.
_DROPPED = ("auto_map", "_name_or_path", PROVENANCE_KEY)


def is_served(config: ModelConfig) -> bool:
    """Whether vLLM serves a model's architecture with packed experts."""
    return next(iter(config.architectures), "") in VLLM_ARCHITECTURES


def quantization_config(plan: Plan) -> dict[str, Any]:
    """The quantization_config: packed modules with their formats, and the source's own entry."""
    source = next((entry for _, entry in stated_entries(plan.config.raw)), None)
    return {
        "quant_method": CCQ,
        "version": VERSION,
        "family": plan.config.family.name,
        "format": plan.format,
        "row_order": plan.row_order,
        "experts": expert_modules(plan),
        SOURCE_KEY: source,
        **plan.config.recorded,
    }


def output_config(plan: Plan, provenance: dict[str, Any]) -> dict[str, Any]:
    """config.json of the output: the source's, with our entry in place of its own, and provenance.

    Loaders that know no quant_method "ccq" refuse it by name.
    """
    stated = without_entries(plan.config.raw)
    result = {key: value for key, value in stated.items() if key not in _DROPPED}
    plan.config.spell_out(result)
    result[QUANTIZATION] = quantization_config(plan)
    result[PROVENANCE_KEY] = {"version": __version__, **provenance}
    return result
