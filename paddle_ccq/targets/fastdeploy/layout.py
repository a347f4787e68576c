# SPDX-License-Identifier: Apache-2.0
"""FastDeploy as the target of a plan: stored tensors, limits of shapes and layers, row order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ...checkpoint.plan import WIDER, Plan, PlanOptions, make_plan
from ...checkpoint.safetensors_format import StoredSpec
from ...codec import formats
from ...codec.formats import stored_order
from ...codec.row_order import FASTDEPLOY_2_1, PLAIN
from ...errors import CcqError
from ...families.ernie45 import PADDLE, ErnieConfig
from ...families.tensor import EXACT_ROLES, TensorSpec
from ...reporting import ranges
from ..vllm_sizes import unfit_for_vllm

# Of --target.
NAME = "fastdeploy"
# The row order that its kernels expect, by --fastdeploy-layout.
ROW_ORDERS = {"2.1": FASTDEPLOY_2_1, "2.0": PLAIN}
DEFAULT_LAYOUT = "2.1"
# Formats of experts that FastDeploy refuses by name and our plugin for it serves.
OWN_FORMATS = tuple(name for name in formats.EXPERT_FORMATS if name != formats.DEFAULT_EXPERTS)
# FastDeploy's release lines that our plugin was made for (fastdeploy/plugin.py).
PLUGIN_RELEASES = ("2.4", "2.5", "2.6", "develop")
# Paddle's loaders accept "np"; nothing else goes into the metadata, so that the same input gives
# the same bytes.
SHARD_METADATA = {"format": PADDLE.format_tag}
# weight_quantize(algo="weight_only_int4") only works on whole pairs of 64-row tiles.
WINT4_ROW_MULTIPLE = 128
# Of the vocabulary (VocabParallelEmbedding).
VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True)
class FastDeploy:
    """Checkpoints that FastDeploy loads.

    Attributes:
        fastdeploy_layout: a key of ROW_ORDERS.
        plugin_layout: any MoE layers may be wint4, which only our plugin for FastDeploy reads.
    """

    fastdeploy_layout: str = DEFAULT_LAYOUT
    plugin_layout: bool = False

    def __post_init__(self) -> None:
        if self.fastdeploy_layout not in ROW_ORDERS:
            known = ", ".join(ROW_ORDERS)
            raise CcqError(f"--fastdeploy-layout {self.fastdeploy_layout}: not one of {known}")

    @property
    def name(self) -> str:
        return NAME

    @property
    def dense_formats(self) -> tuple[str, ...]:
        return formats.DENSE_FORMATS

    @property
    def shard_metadata(self) -> Mapping[str, str]:
        return SHARD_METADATA

    def with_any_layers(self) -> FastDeploy:
        return replace(self, plugin_layout=True)

    def row_order(self, format: str) -> str:
        return stored_order(format, ROW_ORDERS[self.fastdeploy_layout])

    def unquantized_format(self, tensor: TensorSpec) -> str:
        # FastDeploy holds the router and its bias in float32.
        return "f32" if tensor.role in EXACT_ROLES else "bf16"

    def stored(
        self, tensor: TensorSpec, format: str, shape: tuple[int, ...]
    ) -> tuple[StoredSpec, ...]:
        name, stem = tensor.name, tensor.stem
        if format == "f32":
            return ((name, "F32", shape),)
        if format == "bf16":
            # In a quantized checkpoint FastDeploy looks for `.quant_weight` even where
            # modules_to_not_convert leaves a linear layer unquantized (layers/linear.py).
            return ((f"{stem}.quant_weight" if tensor.is_dense else name, "BF16", shape),)
        specs = formats.tensor_specs(format, *shape)
        return tuple((f"{stem}.{suffix}", dtype, dims) for suffix, (dims, dtype) in specs.items())

    def shape_problem(self, format: str, shape: tuple[int, ...]) -> str | None:
        if format in ("bf16", "f32"):
            return None
        k, n = shape
        if format == "wint4" and k % WINT4_ROW_MULTIPLE:
            return f"wint4 needs K (input size) a multiple of {WINT4_ROW_MULTIPLE}, got {k}"
        return formats.shape_problem(format, k, n)

    def check_layers(self, formats: Mapping[int, str]) -> None:
        gap = prefix_gap(formats)
        if gap and not self.plugin_layout:
            raise CcqError(
                f"--rules: layer {gap[0]} would be wint4 after layer {gap[1]} is not; FastDeploy"
                " can't load that: wint4 layers must be the first MoE layers without a gap"
                " (--allow-plugin-layout, for our FastDeploy plugin, takes any)"
            )

    def model_notes(self, config: ErnieConfig) -> list[str]:
        notes = []
        moe = config.moe_layers()
        expected = list(range(config.moe_layer_start_index, config.num_hidden_layers))
        if moe and moe != expected:
            notes.append(
                f"FastDeploy takes every layer from {expected[0]} on as a MoE layer, this model"
                " doesn't; FastDeploy can't load it"
            )
        if config.vocab_size % VOCABULARY_MULTIPLE:
            notes.append(
                f"vocabulary of {config.vocab_size}: FastDeploy pads to a multiple of"
                f" {VOCABULARY_MULTIPLE} and refuses embeddings of another size"
            )
        return notes

    def plan_notes(self, plan: Plan) -> list[str]:
        notes = unfit_for_vllm(plan.config, plan.tensor_parallel_size)
        if not_converted(plan):
            notes.append(
                "dense layers that stay in bf16 are listed in modules_to_not_convert, which needs"
                " FastDeploy 2.5 or later"
            )
        ordered = any(formats.get(name).row_ordered for name in plan.layer_formats.values())
        if self.fastdeploy_layout != DEFAULT_LAYOUT and not ordered:
            notes.append(
                f"--fastdeploy-layout {self.fastdeploy_layout}: changes nothing, no layer is wint2"
            )
        if needs_plugin(plan):
            notes.append(
                "wint4 layers are no prefix: FastDeploy needs our plugin (FD_PLUGINS=paddle_ccq)"
                " and refuses these files without it"
            )
        return notes

    def facts(self, plan: Plan) -> list[tuple[str, str]]:
        if not plan.layer_formats:
            return []
        last = wint4_end_layer(plan)
        four = f"up to layer {last}" if last >= 0 else "none"
        if needs_plugin(plan):
            four = f"{ranges(plan.wint4_layers)} (FastDeploy needs our plugin)"
        return [("wint4 MoE layers", four), ("row order inside 64-groups", plan.row_order)]

    def choices(self, plan: Plan) -> dict[str, Any]:
        chosen = {
            "target": NAME,
            "wint4_end_layer": wint4_end_layer(plan),
            "fastdeploy_layout": plan.row_order,
            "rules": not_converted(plan),
        }
        return chosen | ({"wint4_layers": plan.wint4_layers} if needs_plugin(plan) else {})


def build_plan(config: ErnieConfig, **options: Any) -> Plan:
    """A plan for FastDeploy; `options` are fields of PlanOptions and of FastDeploy.

    Raises:
        CcqError: for what the model or FastDeploy cannot be given.
    """
    names = {field.name for field in fields(FastDeploy)} & options.keys()
    target = FastDeploy(**{name: options.pop(name) for name in names})
    return make_plan(config, PlanOptions(target, **options))


def prefix_gap(formats: Mapping[int, str]) -> tuple[int, int] | None:
    """(a wint4 layer, an earlier one that is not), or None where the first layers are wint4.

    FastDeploy decides by `layer <= quant_end_layer` alone (quantization/wint2.py), so a layer that
    returns to wint4 cannot be written down for it.
    """
    left = None
    for layer, format in sorted(formats.items()):
        if format != WIDER:
            left = layer if left is None else left
        elif left is not None:
            return layer, left
    return None


def needs_plugin(plan: Plan) -> bool:
    """Whether the wint4 layers are no prefix: only our FastDeploy plugin reads a list."""
    return prefix_gap(plan.layer_formats) is not None


def wint4_end_layer(plan: Plan) -> int:
    """FastDeploy's quant_end_layer: the last wint4 layer of a prefix, -1 where there is none.

    Of a list, too, FastDeploy without our plugin must not take a part for the whole: -1.
    """
    return -1 if needs_plugin(plan) else max(plan.wint4_layers, default=-1)


def not_converted(plan: Plan) -> list[str]:
    """Dense linear layers that stay in bf16 (without `.weight`)."""
    return [
        planned.tensor.stem
        for planned in plan.tensors
        if planned.tensor.is_dense and planned.format == "bf16"
    ]
