# SPDX-License-Identifier: Apache-2.0
"""The plan of a run, computed from config.json alone: formats, output tensors, shards, sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..codec.formats import DEFAULT_EXPERTS, EXPERT_FORMATS
from ..errors import CcqError
from ..families.config import ModelConfig
from ..families.tensor import Role, TensorSpec
from .planned import BASE_MEMORY, PlannedTensor, Shard, split, working_bytes
from .rules import DefaultFormat, Rule, forced_layers, layer_formats, matching_rules
from .safetensors_format import StoredSpec

DEFAULT_SHARD_BYTES = 5_000_000_000
# The format of dense linear layers, and the wider format of experts.
DENSE, WIDER = "wint8", "wint4"


class Target(Protocol):
    """The interface through which a plan knows the engine that it is made for (targets/)."""

    @property
    def name(self) -> str:
        """What `--target` calls it."""
        ...

    @property
    def shard_metadata(self) -> Mapping[str, str]:
        """The metadata of every weight file."""
        ...

    @property
    def dense_formats(self) -> tuple[str, ...]:
        """What dense linear layers may become, the default first; nothing: they are kept."""
        ...

    def with_any_layers(self) -> Target:
        """The same target, but with any format of experts allowed in any layer."""
        ...

    def row_order(self, format: str) -> str:
        """The order in which rows of a format are stored (codec/row_order.py)."""
        ...

    def unquantized_format(self, tensor: TensorSpec) -> str:
        """How a tensor is stored that is never quantized: "f32", "bf16" or KEPT."""
        ...

    def stored(
        self, tensor: TensorSpec, format: str, shape: tuple[int, ...]
    ) -> tuple[StoredSpec, ...]:
        """The stored tensors of a tensor in a format; `shape` is a rank's."""
        ...

    def shape_problem(self, format: str, shape: tuple[int, ...]) -> str | None:
        """Why a tensor cannot take a format, in plain words; None if it can."""
        ...

    def check_layers(self, formats: Mapping[int, str]) -> None:
        """Refuse formats of MoE layers that the engine cannot load; there may be no such layer."""
        ...

    def model_notes(self, config: ModelConfig) -> list[str]:
        """Notes on what the engine cannot do with a model whose checkpoint can be written."""
        ...

    def plan_notes(self, plan: Plan) -> list[str]:
        """Notes about the engine for the user of a plan."""
        ...

    def facts(self, plan: Plan) -> list[tuple[str, str]]:
        """The engine's own lines in the table of a dry run."""
        ...

    def choices(self, plan: Plan) -> dict[str, Any]:
        """The target's choices that decide the bytes of the output, for the journal."""
        ...


@dataclass(frozen=True)
class LayerFormats:
    """The formats of the experts of every MoE layer, where no rule decides.

    Attributes:
        formats: format by layer.
        reason: what chose the formats, in a word, for the plan's table.
        wider_reason: what chose the wint4 layers, if it was something else.
    """

    formats: Mapping[int, str]
    reason: str
    wider_reason: str | None = None

    @classmethod
    def prefix(cls, config: ModelConfig, format: str, end: int | None) -> LayerFormats:
        """wint4 up to layer `end` (None: the family's default), then `format`."""
        last = config.family.wint4_end_layer(config) if end is None else end
        formats = {layer: WIDER if layer <= last else format for layer in config.moe_layers()}
        return cls(formats, "--format", "prefix")

    def reason_of(self, layer: int) -> str:
        """What chose the format of a layer."""
        wider = self.wider_reason is not None and self.formats[layer] == WIDER
        return self.wider_reason if wider else self.reason


@dataclass(frozen=True)
class PlanOptions:
    """The choices that a plan is made from.

    Attributes:
        target: the engine that the checkpoint is for.
        format: of routed experts.
        wint4_end_layer: MoE layers up to this one are wint4, -1 for none; None: the
            family's default.
        tensor_parallel_size: number of rank folders.
        rules: formats of single matrices; they come before everything else.
        max_shard_bytes: of one file.
        layer_formats: formats of whole MoE layers, instead of a wint4 prefix.
    """

    target: Target
    format: str = DEFAULT_EXPERTS
    wint4_end_layer: int | None = None
    tensor_parallel_size: int = 1
    rules: Sequence[Rule] = ()
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    layer_formats: LayerFormats | None = None

    def check(self, config: ModelConfig) -> None:
        """Refuse options that no model, or not this model, can have."""
        if self.format not in EXPERT_FORMATS:
            raise CcqError(f"--format {self.format}: not one of {', '.join(EXPERT_FORMATS)}")
        last, end = config.num_hidden_layers - 1, self.wint4_end_layer
        if end is not None and not -1 <= end <= last:
            raise CcqError(
                f"--wint4-end-layer {end}: this model's layers are 0 to {last} (-1 for none)"
            )
        if self.max_shard_bytes < 1:
            raise CcqError(f"--max-shard-size: {self.max_shard_bytes} bytes is no size")


@dataclass(frozen=True)
class Plan:
    """The resolved job. Tensors are processed and written strictly in order."""

    config: ModelConfig
    options: PlanOptions  # as asked for; the other fields follow from them
    format: str  # what the 2-bit MoE layers become; "wint8" for a model without MoE layers
    tensors: tuple[PlannedTensor, ...]
    shards: tuple[Shard, ...]
    # Why each MoE layer's experts have their format.
    reasons: Mapping[int, str]
    messages: tuple[str, ...] = ()

    def with_layer_formats(self, formats: LayerFormats) -> Plan:
        """The same choices with other formats of MoE layers, wint4 in any of them."""
        target = self.target.with_any_layers()
        return make_plan(self.config, replace(self.options, target=target, layer_formats=formats))

    @property
    def target(self) -> Target:
        """The engine that the checkpoint is for."""
        return self.options.target

    @property
    def tensor_parallel_size(self) -> int:
        """Number of ranks; every rank has its own folder where there are several."""
        return self.options.tensor_parallel_size

    @property
    def max_shard_bytes(self) -> int:
        """Largest size of one file in bytes."""
        return self.options.max_shard_bytes

    @property
    def row_order(self) -> str:
        """The order in which rows of the experts' format are stored."""
        return self.target.row_order(self.format)

    @property
    def layer_formats(self) -> dict[int, str]:
        """The format of every MoE layer's experts."""
        experts = (planned for planned in self.tensors if planned.tensor.is_expert)
        return {planned.layer: planned.format for planned in experts if planned.layer is not None}

    @property
    def wint4_layers(self) -> list[int]:
        """The MoE layers whose experts are wint4."""
        return [layer for layer, format in self.layer_formats.items() if format == WIDER]

    @property
    def weights(self) -> int:
        """Values of all tensors, uncut: those that all ranks hold count once."""
        return sum(planned.weights for planned in self.tensors)

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors of all ranks."""
        return self.tensor_parallel_size * sum(planned.rank_bytes for planned in self.tensors)

    @property
    def source_bytes(self) -> int:
        """Bytes of the source, where its tensors are known; else at two bytes a weight."""
        found = sum(planned.tensor.source_bytes for planned in self.tensors)
        return found or 2 * self.weights

    def bits_per_weight(self, role: Role | None = None) -> float:
        """Stored bits per weight of the tensors of a role, or of all; over all ranks."""
        chosen = [planned for planned in self.tensors if role in (None, planned.tensor.role)]
        weights = sum(planned.weights for planned in chosen)
        bits = 8 * self.tensor_parallel_size * sum(planned.rank_bytes for planned in chosen)
        return bits / weights if weights else 0.0

    def peak_memory(self) -> int:
        """Estimated peak host memory in bytes; set by the largest tensor, not by the model."""
        return BASE_MEMORY + max(map(working_bytes, self.tensors))


def make_plan(config: ModelConfig, options: PlanOptions) -> Plan:
    """Resolve every choice for a model, or refuse it in one line before any work starts.

    Raises:
        CcqError: naming the flag or the tensor that does not fit the model or the target.
    """
    options.check(config)
    target, size = options.target, options.tensor_parallel_size
    layers = options.layer_formats or LayerFormats.prefix(
        config, options.format, options.wint4_end_layer
    )
    defaults = _default_formats(target, config, layers)
    found = matching_rules(options.rules, defaults, options.format, target.dense_formats)
    formats, reasons = {}, {}
    for default in defaults:
        tensor, rule = default.tensor, found.get(default.tensor.name)
        formats[tensor.name] = rule.format if rule else default.format
        if tensor.is_expert and tensor.layer is not None:
            reasons[tensor.layer] = f"rule {rule.match}" if rule else default.reason
    experts = [d.tensor for d in defaults if d.tensor.is_expert]
    target.check_layers(layer_formats(formats, experts))
    _check_tensor_parallel(target, config, formats, size)
    tensors = tuple(
        _planned(target, i, tensor, formats[tensor.name], size)
        for i, tensor in enumerate(config.tensors.values())
    )
    plan = Plan(
        config=config,
        options=options,
        format=options.format if experts else DENSE,
        tensors=tensors,
        shards=split(tensors, options.max_shard_bytes),
        reasons=reasons,
    )
    return replace(plan, messages=tuple(_messages(plan)))


def _messages(plan: Plan) -> list[str]:
    messages = plan.target.model_notes(plan.config)
    formats = set(plan.layer_formats.values())
    if not formats:
        messages.append(
            "this model has no MoE layer, so nothing becomes 2-bit: its linear layers are wint8"
        )
    elif formats == {WIDER}:
        messages.append("the wint4 prefix covers every MoE layer, so nothing becomes 2-bit")
    return [*messages, *plan.target.plan_notes(plan)]


def rule_forced_layers(config: ModelConfig, format: str, rules: Sequence[Rule]) -> dict[int, str]:
    """Formats of the MoE layers that rules decide; an allocation may choose the others."""
    defaults = [DefaultFormat(tensor, format) for tensor in config.tensors.values()]
    found = matching_rules(rules, defaults, format)
    return forced_layers(found, (d.tensor for d in defaults if d.tensor.is_expert))


def _default_formats(
    target: Target, config: ModelConfig, layers: LayerFormats
) -> list[DefaultFormat]:
    """Every tensor with the format that it gets where no rule matches it."""
    defaults = []
    for tensor in config.tensors.values():
        layer = tensor.layer
        if tensor.is_expert and layer is not None:
            defaults.append(DefaultFormat(tensor, layers.formats[layer], layers.reason_of(layer)))
        elif tensor.is_dense and target.dense_formats:
            defaults.append(DefaultFormat(tensor, target.dense_formats[0]))
        else:
            defaults.append(DefaultFormat(tensor, target.unquantized_format(tensor)))
    return defaults


def _rank_problem(
    target: Target, config: ModelConfig, tensor: TensorSpec, format: str, size: int
) -> str | None:
    """Why one of `size` ranks cannot hold its part of a tensor; None if it can."""
    cut = tensor.cut
    if cut is None or size == 1:
        return target.shape_problem(format, tensor.shape)
    if not cut.fits(size):
        if tensor.role is Role.ATTENTION:
            heads = f"{config.num_attention_heads} query and {config.num_key_value_heads} key heads"
            return f"{heads} can't be shared out evenly over {size} ranks"
        return f"{cut.parts[0]} can't be cut into {size} equal parts"
    return target.shape_problem(format, cut.rank_shape(tensor.shape, size))


def _check_tensor_parallel(
    target: Target, config: ModelConfig, formats: Mapping[str, str], size: int
) -> None:
    # Layers and experts repeat a few shapes; one of each kind is enough to look at.
    kinds: dict[tuple[str, tuple[int, ...], str], TensorSpec] = {}
    for tensor in config.tensors.values():
        kinds.setdefault((tensor.template, tensor.shape, formats[tensor.name]), tensor)

    def problem(ranks: int) -> str | None:
        for (_, _, format), tensor in kinds.items():
            found = _rank_problem(target, config, tensor, format, ranks)
            if found:
                return f"{tensor.name}: {found}"
        return None

    if size < 1:
        raise CcqError(f"--tensor-parallel-size {size}: must be at least 1")
    whole = problem(1)
    if whole:
        raise CcqError(whole)
    found = problem(size)
    if found:
        # More ranks than heads never work.
        works = [str(n) for n in range(1, config.num_attention_heads + 1) if not problem(n)]
        raise CcqError(
            f"--tensor-parallel-size {size} does not fit this model: {found}; sizes that work:"
            f" {', '.join(works)}"
        )


def _planned(
    target: Target, index: int, tensor: TensorSpec, format: str, size: int
) -> PlannedTensor:
    cut, shape = tensor.cut, tensor.shape
    rank_shape = cut.rank_shape(shape, size) if cut and size > 1 else shape
    return PlannedTensor(index, tensor, format, target.stored(tensor, format, rank_shape))
