# SPDX-License-Identifier: Apache-2.0
"""Holding a checkpoint for FastDeploy against what its own config.json promises."""

from __future__ import annotations

import fnmatch
import math
import re
from pathlib import Path

from ...checkpoint.plan import LayerFormats, Plan
from ...checkpoint.planned import PlannedTensor
from ...checkpoint.rules import Rule
from ...checkpoint.safetensors_format import FLOAT_DTYPES
from ...codec.formats import DEFAULT_EXPERTS, EXPERT_FORMATS
from ...errors import CcqError
from ...families.config import CCQ, ModelConfig
from ...families.tensor import Role
from ..inspection import Inspection
from .config import (
    WINT4_LAYERS,
    config_problems,
    wint4_end_layer_of,
    wint4_layers_of,
)
from .layout import build_plan


class FastDeployInspection(Inspection):
    """A checkpoint for FastDeploy, in one folder or in one of each rank."""

    engine = "FastDeploy"

    def expected_plan(self) -> Plan:
        return _expected_plan(self.config, self.folder)

    def config_problems(self) -> list[str]:
        return config_problems(self.config.raw)

    def accepted(self, planned: PlannedTensor, name: str, dtype: str) -> tuple[str, ...]:
        """It casts the router and the scales of dense layers."""
        dense_scale = planned.tensor.is_dense and name.endswith(".weight_scale")
        if dense_scale or planned.tensor.role is Role.ROUTER:
            return FLOAT_DTYPES
        return (dtype,)

    def reshaped(
        self, planned: PlannedTensor, found: tuple[int, ...], expected: tuple[int, ...]
    ) -> bool:
        """It reshapes the correction bias."""
        bias = planned.tensor.role is Role.CORRECTION_BIAS
        return bias and math.prod(found) == math.prod(expected)


def _expected_plan(config: ModelConfig, folder: Path) -> Plan:
    quantization = config.raw.get("quantization_config")
    where = folder / "config.json"
    if not isinstance(quantization, dict):
        raise CcqError(f"{where}: no quantization_config; this is not a quantized checkpoint")
    format = quantization.get("quantization")
    if format is None and quantization.get("quant_method") == CCQ:
        raise CcqError(
            f"{where}: a checkpoint in Hugging Face's layout, which FastDeploy does not read; an"
            " ERNIE-4.5 text model can be quantized anew with --target fastdeploy"
        )
    if format not in (*EXPERT_FORMATS, "wint8"):
        raise CcqError(
            f"{where}: quantization_config.quantization is {format!r}; known here are"
            f" {', '.join(EXPERT_FORMATS)} and, for models without MoE layers, wint8"
        )
    if format == "wint8" and config.moe_num_experts:
        raise CcqError(f"{where}: a wint8 model with MoE layers is not written by this package")
    end_layer = -1 if format == "wint8" else wint4_end_layer_of(config.raw)
    if end_layer is None:
        raise CcqError(f"{where}: quantization_config: quant_end_layer is not a number")
    listed = wint4_layers_of(quantization)
    layer_formats = None
    if listed is not None:
        chosen = {n: "wint4" if n in listed else format for n in config.moe_layers()}
        layer_formats = LayerFormats(chosen, WINT4_LAYERS)
    ranks = [p for p in folder.iterdir() if re.fullmatch(r"rank\d+", p.name) and p.is_dir()]
    size = len(ranks) or 1
    wrong = {p.name for p in ranks} ^ {f"rank{i}" for i in range(len(ranks))}
    if wrong or len(ranks) == 1:
        raise CcqError(
            f"{folder}: rank folders {', '.join(sorted(p.name for p in ranks))} are not a whole set"
            " of rank0 to rankN-1 with N at least 2; some are missing"
        )
    return build_plan(
        config,
        format=DEFAULT_EXPERTS if format == "wint8" else format,
        wint4_end_layer=None
        if layer_formats
        else max(-1, min(end_layer, config.num_hidden_layers - 1)),
        tensor_parallel_size=size,
        rules=_unquantized_dense(config, quantization.get("modules_to_not_convert")),
        layer_formats=layer_formats,
        plugin_layout=layer_formats is not None,
    )


def _unquantized_dense(config: ModelConfig, patterns: object) -> list[Rule]:
    if not isinstance(patterns, list):
        return []
    return [
        Rule(name, "bf16")
        for name, tensor in config.tensors.items()
        if tensor.is_dense
        and any(
            isinstance(pattern, str) and fnmatch.fnmatchcase(tensor.stem, pattern)
            for pattern in patterns
        )
    ]
