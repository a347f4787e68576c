# SPDX-License-Identifier: Apache-2.0
"""The config.json that FastDeploy reads: what is written into it, and what it must not hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...checkpoint.plan import Plan
from ...checkpoint.reader import PROVENANCE_KEY
from ...codec.formats import EXPERT_FORMATS
from ...errors import CcqError
from ...version import __version__
from .layout import needs_plugin, not_converted, wint4_end_layer

MOE_ARCHITECTURE = "Ernie4_5_MoeForCausalLM"
DENSE_ARCHITECTURE = "Ernie4_5_ForCausalLM"
# Newer than this, a `dtype` in config.json reads as a torch checkpoint (FastDeploy config.py).
NEWEST_TRANSFORMERS = (4, 56, 0)
# Key of moe_quant_config that our FastDeploy plugin reads, and no FastDeploy by itself.
WINT4_LAYERS = "wint4_layers"
# config.json entries that speak of the source's files or code and not of what is written.
_DROPPED = ("torch_dtype", "transformers_version", "auto_map", "_name_or_path", PROVENANCE_KEY)


def quantization_config(plan: Plan) -> dict[str, Any]:
    """The quantization_config of config.json, in the published structure.

    Of wint4 layers that are no prefix there is a list; FastDeploy's own key then says none, so that
    it misses tensors of the first such layer and stops instead of misreading any.

    FastDeploy reads `quantization` and the nested moe_quant_config; the top-level moe_quant_type
    is written as published. A 2.5- or 2.75-bit checkpoint carries its own name, which FastDeploy
    refuses as an invalid method instead of misreading the tensors.
    """
    result: dict[str, Any] = {"dense_quant_type": "wint8"}
    format, end = plan.format, wint4_end_layer(plan)
    if format == "wint8":
        result["quantization"] = "wint8"
    else:
        result["moe_quant_type"] = "w4w2"
        result["quantization"] = format
        result["moe_quant_config"] = {
            "quant_type": "w4w2",
            "moe_w4_quant_config": {
                "quant_type": "wint4",
                "quant_granularity": "per_channel",
                "quant_start_layer": 0,
                "quant_end_layer": end,
            },
            "moe_w2_quant_config": {
                "quant_type": format,
                "quant_granularity": "pp_acc",
                "quant_group_size": 64,
                "quant_start_layer": end + 1,
                "quant_end_layer": plan.config.num_hidden_layers - 1,
            },
        }
        if needs_plugin(plan):
            result["moe_quant_config"][WINT4_LAYERS] = plan.wint4_layers
    unquantized = not_converted(plan)
    if unquantized:
        result["modules_to_not_convert"] = unquantized
    return result


def output_config(plan: Plan, provenance: dict[str, Any]) -> dict[str, Any]:
    """config.json of the output: the source's, as FastDeploy wants it, plus our provenance."""
    config = plan.config
    moe = config.moe_num_experts > 0
    result = {key: value for key, value in config.raw.items() if key not in _DROPPED}
    result["architectures"] = [MOE_ARCHITECTURE if moe else DENSE_ARCHITECTURE]
    result["dtype"] = "bfloat16"
    # Where config.json is silent, FastDeploy's defaults (PRETRAINED_INIT_CONFIGURATION in its
    # config.py) are not those of the ERNIE classes; so everything it reads is spelled out.
    config.spell_out(result)
    result["quantization_config"] = quantization_config(plan)
    result[PROVENANCE_KEY] = {"version": __version__, **provenance}
    return result


def config_problems(raw: dict[str, Any]) -> list[str]:
    """What in a config.json keeps FastDeploy from reading it as a quantized Paddle checkpoint."""
    problems = []
    if "torch_dtype" in raw:
        both = " beside dtype" if "dtype" in raw else ""
        problems.append(
            f"config.json: torch_dtype{both}: FastDeploy takes this for a torch checkpoint; only"
            " dtype may be there"
        )
    elif raw.get("dtype") is None:
        problems.append("config.json: dtype is missing; FastDeploy can't tell the model format")
    if "dtype" in raw and _newer(raw.get("transformers_version")):
        problems.append(
            f"config.json: transformers_version {raw['transformers_version']} with dtype makes"
            " FastDeploy take this for a torch checkpoint; remove transformers_version"
        )
    quantization = raw.get("quantization_config")
    if not isinstance(quantization, dict) or not isinstance(quantization.get("quantization"), str):
        problems.append("config.json: quantization_config.quantization is missing")
        return problems
    for key in ("is_quantized", "is_moe_quantized"):
        if quantization.get(key, True) is not True:
            problems.append(f"config.json: quantization_config.{key} must be true or absent")
    format = quantization["quantization"]
    if format not in EXPERT_FORMATS:
        return problems
    if raw.get("architectures") != [MOE_ARCHITECTURE]:
        problems.append(f"config.json: architectures must be [{MOE_ARCHITECTURE!r}] for {format}")
    node: Any = quantization
    for key in ("moe_quant_config", "moe_w2_quant_config"):
        node = node.get(key, {}) if isinstance(node, dict) else {}
    stated = node.get("quant_type", format) if isinstance(node, dict) else None
    if stated != format:
        problems.append(
            "config.json: quantization_config.moe_quant_config.moe_w2_quant_config.quant_type is"
            f" {stated!r}, but quantization says {format!r}"
        )
    return problems


def _newer(version: object) -> bool:
    if version is None:
        return False
    numbers = [int(n) for n in re.findall(r"\d+", str(version))[:3]]
    return tuple(numbers + [0] * (3 - len(numbers))) > NEWEST_TRANSFORMERS


def wint4_end_layer_of(raw: dict[str, Any]) -> int | None:
    """quant_end_layer of the wint4 layers as FastDeploy reads it (its default is 6)."""
    node: Any = raw.get("quantization_config")
    for key in ("moe_quant_config", "moe_w4_quant_config"):
        node = node.get(key, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        return None
    value = node.get("quant_end_layer", 6)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def wint4_layers_of(quantization: Mapping[str, Any]) -> frozenset[int] | None:
    """The list of wint4 layers in a quantization_config; None where there is none.

    Raises:
        CcqError: if it is no list of layer numbers.
    """
    node = quantization.get("moe_quant_config", {})
    value = node.get(WINT4_LAYERS) if isinstance(node, Mapping) else None
    if value is None:
        return None
    good = isinstance(value, list) and all(
        isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in value
    )
    if not good:
        raise CcqError(
            f"config.json: moe_quant_config.{WINT4_LAYERS}: must be a list of layer numbers"
        )
    return frozenset(value)
