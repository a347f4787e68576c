# SPDX-License-Identifier: Apache-2.0
"""Formats of all MoE layers for a target size, with their predicted loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..checkpoint.plan import LayerFormats, Plan
from ..codec import formats
from ..errors import CcqError
from ..units import gigabytes
from .costs import Sensitivities
from .knapsack import Option, allocate, allocate_prefix, total_cost, total_size
from .target import Target

HIGH = "wint4"


@dataclass(frozen=True)
class Row:
    """One way to spend bits: a line of the comparison."""

    name: str
    formats: Mapping[int, str]
    loss: float
    plan: Plan


@dataclass(frozen=True)
class Allocation:
    """The chosen formats, and the other choices that they are compared with."""

    target: Target
    layer_formats: LayerFormats
    rows: tuple[Row, ...]  # uniform, the prefix of the same target, the choice
    sensitivities: Sensitivities
    plugin_layout: bool

    @property
    def loss(self) -> float:
        """Predicted loss of the choice."""
        return self.rows[-1].loss

    def as_dict(self) -> dict[str, Any]:
        """For the journal and the checkpoint's provenance."""
        found = self.sensitivities
        costs = found.costs.items()
        return {
            "target": self.target.text,
            "plugin_layout": self.plugin_layout,
            "wint4_layers": [
                n for n, format in self.layer_formats.formats.items() if format == HIGH
            ],
            "method": found.method,
            "sensitivity_sha256": found.sha256,
            "sensitivity_calibration": dict(found.calibration),
            "predicted_loss": {row.name: row.loss for row in self.rows},
            "costs": {str(n): {p: dict(c) for p, c in parts.items()} for n, parts in costs},
        }


def allocate_layers(
    target: Target,
    base: str,
    layers: Sequence[int],
    forced: Mapping[int, str],
    found: Sensitivities,
    plan: Plan,
    plugin_layout: bool,
) -> Allocation:
    """Choose `base` or wint4 for every MoE layer that no rule decides; `plan` is any of the model.

    Raises:
        CcqError: if the target is below the smallest checkpoint, or no prefix suits the rules.
    """
    if not layers:
        raise CcqError("--allocate: this model has no MoE layer to choose formats for")
    uniform = {format: _uniform(format, layers, forced, plan) for format in (base, HIGH)}
    sizes = {format: _layer_sizes(plan, target) for format, plan in uniform.items()}
    items = []
    for layer in layers:
        allowed = (forced[layer],) if layer in forced else (base, HIGH)
        items.append([Option(f, sizes[f][layer], found.layer(layer, f)) for f in allowed])
    budget = _budget(target, uniform[base], sum(sizes[base].values()))
    smallest = sum(min(option.size for option in options) for options in items)
    if smallest > budget:
        least = _shown(target, uniform[base], smallest)
        raise CcqError(
            f"--allocate {target.text}: the smallest this model can be is {least}"
            + (" with these rules" if forced else "")
        )
    prefix = allocate_prefix(items, budget, HIGH)
    chosen = allocate(items, budget) if plugin_layout else prefix
    if chosen is None:
        raise CcqError(
            f"--allocate {target.text}: no wint4 prefix within it agrees with --rules; change the"
            " rules, or add --allow-plugin-layout if our FastDeploy plugin will load the result"
        )

    def row(name: str, options: Sequence[Option]) -> Row:
        by_layer = {layer: o.format for layer, o in zip(layers, options, strict=True)}
        laid = plan.with_layer_formats(LayerFormats(by_layer, "allocation"))
        return Row(name, by_layer, total_cost(options), laid)

    lowest = [min(options, key=lambda o: (o.format == HIGH, o.size)) for options in items]
    rows = [row(f"uniform {base}", lowest)]
    if prefix is not None and plugin_layout:
        # At the size of the choice, so that the prefix gets no bytes that the choice did not use.
        same = allocate_prefix(items, total_size(chosen), HIGH)
        rows += [row("wint4 prefix of the same size", same)] if same else []
    rows.append(row("allocated" if plugin_layout else "allocated (prefix)", chosen))
    layer_formats = LayerFormats(rows[-1].formats, "allocation")
    return Allocation(target, layer_formats, tuple(rows), found, plugin_layout)


def _uniform(format: str, layers: Sequence[int], forced: Mapping[int, str], plan: Plan) -> Plan:
    return plan.with_layer_formats(
        LayerFormats({layer: forced.get(layer, format) for layer in layers}, "uniform")
    )


def _layer_sizes(plan: Plan, target: Target) -> dict[int, int]:
    """Size of each MoE layer in the target's unit: bytes, or 1/64 bits of the rate."""
    sizes: dict[int, int] = {}
    for planned in plan.tensors:
        if planned.tensor.is_expert and planned.layer is not None:
            size = plan.tensor_parallel_size * planned.rank_bytes
            if target.bits is not None:
                size = round(64 * formats.get(planned.format).bits_per_weight) * planned.weights
            sizes[planned.layer] = sizes.get(planned.layer, 0) + size
    return sizes


def _budget(target: Target, smallest: Plan, experts: int) -> int:
    if target.bits is not None:
        weights = sum(planned.weights for planned in smallest.tensors if planned.tensor.is_expert)
        # Computed as a fraction, because 2.0625 times many weights is rounded in floating point.
        return int(64 * Fraction(str(target.bits)) * weights)
    assert target.bytes is not None
    return target.bytes - (smallest.output_bytes - experts)


def _shown(target: Target, plan: Plan, size: int) -> str:
    if target.bits is not None:
        weights = sum(planned.weights for planned in plan.tensors if planned.tensor.is_expert)
        return f"{size / 64 / weights:.4f}bpw"
    experts = sum(_layer_sizes(plan, target).values())
    return gigabytes(plan.output_bytes - experts + size)
