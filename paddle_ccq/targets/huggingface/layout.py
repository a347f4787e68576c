# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's naming as the target of a plan: packed experts, and all else as the source has it.

docs/reference/huggingface-layout.md is the specification.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...checkpoint.plan import Plan
from ...checkpoint.planned import KEPT
from ...checkpoint.safetensors_format import StoredSpec
from ...checkpoint.source_tensors import KEPT_NAMING
from ...codec import formats
from ...codec.row_order import PLAIN
from ...errors import CcqError
from ...families.config import ModelConfig
from ...families.tensor import TensorSpec
from ...reporting import ranges
from ..vllm_sizes import unfit_for_vllm

# Of --target.
NAME = "huggingface"
SHARD_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class HuggingFace:
    """Checkpoints with the source's own names, dtypes and bytes for all but the routed experts."""

    @property
    def name(self) -> str:
        return NAME

    @property
    def shard_metadata(self) -> Mapping[str, str]:
        return SHARD_METADATA

    @property
    def dense_formats(self) -> tuple[str, ...]:
        return ()

    def with_any_layers(self) -> HuggingFace:
        return self

    def row_order(self, format: str) -> str:
        return PLAIN

    def unquantized_format(self, tensor: TensorSpec) -> str:
        return KEPT

    def stored(
        self, tensor: TensorSpec, format: str, shape: tuple[int, ...]
    ) -> tuple[StoredSpec, ...]:
        if format == KEPT:
            if not tensor.kept:
                raise ValueError(f"{tensor.name}: how the source holds it has not been asked")
            return tensor.kept
        stem = packed_stem(tensor)
        specs = formats.tensor_specs(format, *shape)
        return tuple((f"{stem}.{suffix}", dtype, dims) for suffix, (dims, dtype) in specs.items())

    def shape_problem(self, format: str, shape: tuple[int, ...]) -> str | None:
        return None if format == KEPT else formats.shape_problem(format, *shape)

    def check_layers(self, formats: Mapping[int, str]) -> None:
        if not formats:
            raise CcqError(
                "--target huggingface: this model has no routed experts, and nothing else would"
                " become smaller"
            )

    def model_notes(self, config: ModelConfig) -> list[str]:
        return unfit_for_vllm(config)

    def plan_notes(self, plan: Plan) -> list[str]:
        return []

    def facts(self, plan: Plan) -> list[tuple[str, str]]:
        four = ranges(plan.wint4_layers) if plan.wint4_layers else "none"
        return [("wint4 MoE layers", four), ("row order inside 64-groups", plan.row_order)]

    def choices(self, plan: Plan) -> dict[str, Any]:
        family = plan.config.family.name
        return {"target": NAME, "family": family, "wint4_layers": plan.wint4_layers}


def packed_stem(tensor: TensorSpec) -> str:
    """What the names of a packed expert's tensors begin with."""
    storage = tensor.sources[KEPT_NAMING]
    return storage.packed_here or storage.packed


def expert_modules(plan: Plan) -> dict[str, str]:
    """Module of routed experts, by its name on disk -> their format."""
    modules = {}
    for planned in plan.tensors:
        if planned.tensor.is_expert:
            module = packed_stem(planned.tensor).rsplit(".", 2)[0]
            modules[module] = planned.format
    return modules
