# SPDX-License-Identifier: Apache-2.0
"""What a run will do, worked out from config.json alone: formats, output tensors, shards, sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..codec.formats import DEFAULT_EXPERTS, EXPERT_FORMATS
from ..errors import CcqError
from ..families.tensor import Cut, Role, TensorSpec
from .config import ErnieConfig
from .rules import Candidate, Rule, forced_layers, layer_formats, matching_rules
from .safetensors_format import StoredSpec, shard_name, tensor_bytes

DEFAULT_SHARD_BYTES = 5_000_000_000
# What dense linear layers become; formats of experts that lose less than the experts' own.
DENSE, WIDER = "wint8", "wint4"

# The published 54-layer recipe keeps MoE layers up to 6 at wint4. On a measured 10-layer model a
# wint4 prefix bought 4 % of KL for 0.22 bits per weight, so smaller models get none.
PREFIX_MIN_LAYERS = 40
PUBLISHED_WINT4_END_LAYER = 6

# Interpreter and libraries, before any tensor is read.
BASE_MEMORY = 150_000_000
# Bytes of host memory per weight at the worst moment, beside the output: stored values and float32,
# or float32, a re-ordered copy and one encoder slice (quantized); measured 8.4 with the output.
QUANTIZED_BYTES_PER_WEIGHT = 9
KEPT_BYTES_PER_WEIGHT = 4


@dataclass(frozen=True)
class Item:
    """One tensor of the model and what it becomes; every rank gets the same shapes."""

    index: int
    tensor: TensorSpec
    format: str  # "f32" and "bf16" are stored as they are
    specs: tuple[StoredSpec, ...]  # of one rank

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.tensor.name

    @property
    def layer(self) -> int | None:
        return self.tensor.layer

    @property
    def shape(self) -> tuple[int, ...]:
        """Canonical, of the whole tensor."""
        return self.tensor.shape

    @property
    def cut(self) -> Cut | None:
        return self.tensor.cut

    @property
    def quantized(self) -> bool:
        return self.format not in ("bf16", "f32")

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def rank_bytes(self) -> int:
        return sum(tensor_bytes(dtype, shape) for _, dtype, shape in self.specs)


@dataclass(frozen=True)
class Shard:
    """One output file of every rank: items first..last, in order."""

    name: str
    items: tuple[Item, ...]

    @property
    def specs(self) -> list[StoredSpec]:
        return [spec for item in self.items for spec in item.specs]


class Target(Protocol):
    """What a plan asks of the engine that it is made for (targets/)."""

    @property
    def shard_metadata(self) -> Mapping[str, str]:
        """The metadata of every weight file."""
        ...

    def with_any_layers(self) -> Target:
        """The same target, any of whose layers may have any format of experts."""
        ...

    def row_order(self, format: str) -> str:
        """The order in which rows of a format are stored (codec/row_order.py)."""
        ...

    def kept_format(self, tensor: TensorSpec) -> str:
        """The float type of a tensor that is never quantized: "f32" or "bf16"."""
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
        """Refuse formats of MoE layers that the engine cannot load."""
        ...

    def model_notes(self, config: ErnieConfig) -> list[str]:
        """What the engine will not do with a model, though the checkpoint can be written."""
        ...

    def plan_notes(self, plan: Plan) -> list[str]:
        """What the user of a plan must know of the engine."""
        ...

    def facts(self, plan: Plan) -> list[tuple[str, str]]:
        """What of a plan is the engine's, for the table of a dry run."""
        ...

    def choices(self, plan: Plan) -> dict[str, Any]:
        """What of the target decides the bytes of the output, for the journal."""
        ...


@dataclass(frozen=True)
class Layout:
    """Formats of the experts of every MoE layer, where no rule decides.

    Attributes:
        formats: by layer.
        reason: who chose, in a word, for the plan's table.
        wider_reason: who chose the wint4 layers, if somebody else did.
    """

    formats: Mapping[int, str]
    reason: str
    wider_reason: str | None = None

    @classmethod
    def prefix(cls, config: ErnieConfig, format: str, end: int | None) -> Layout:
        """wint4 up to layer `end` (None: the default of the model's depth), then `format`."""
        last = default_wint4_end_layer(config) if end is None else end
        formats = {layer: WIDER if layer <= last else format for layer in config.moe_layers()}
        return cls(formats, "--format", "prefix")

    def reason_of(self, layer: int) -> str:
        """Who chose the format of a layer."""
        wider = self.wider_reason is not None and self.formats[layer] == WIDER
        return self.wider_reason if wider else self.reason


@dataclass(frozen=True)
class PlanOptions:
    """The choices that a plan is made from.

    Attributes:
        target: the engine that the checkpoint is for.
        format: of routed experts.
        wint4_end_layer: MoE layers up to this one are wint4, -1 for none; None: the default of
            the model's depth.
        tensor_parallel_size: number of rank folders.
        rules: formats of single matrices; they come before everything else.
        max_shard_bytes: of one file.
        layout: formats of whole MoE layers, in the place of a wint4 prefix.
    """

    target: Target
    format: str = DEFAULT_EXPERTS
    wint4_end_layer: int | None = None
    tensor_parallel_size: int = 1
    rules: Sequence[Rule] = ()
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    layout: Layout | None = None

    def check(self, config: ErnieConfig) -> None:
        """Refuse what no model, or not this one, can be given."""
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
    """The resolved job. Items are processed and written strictly in order."""

    config: ErnieConfig
    options: PlanOptions  # what was asked for; the other fields are what came of it
    format: str  # what the 2-bit MoE layers become; "wint8" for a model without MoE layers
    items: tuple[Item, ...]
    shards: tuple[Shard, ...]
    # Why each MoE layer's experts have their format.
    reasons: Mapping[int, str]
    messages: tuple[str, ...] = ()

    def with_layout(self, layout: Layout) -> Plan:
        """The same choices with other formats of MoE layers, wint4 in any of them."""
        target = self.target.with_any_layers()
        return make_plan(self.config, replace(self.options, target=target, layout=layout))

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
        """Of one file."""
        return self.options.max_shard_bytes

    @property
    def row_order(self) -> str:
        """The order in which rows of the experts' format are stored."""
        return self.target.row_order(self.format)

    @property
    def layer_formats(self) -> dict[int, str]:
        """The format of every MoE layer's experts."""
        experts = (item for item in self.items if item.tensor.is_expert)
        return {item.layer: item.format for item in experts if item.layer is not None}

    @property
    def wint4_layers(self) -> list[int]:
        """MoE layers in wint4."""
        return [layer for layer, format in self.layer_formats.items() if format == WIDER]

    @property
    def weights(self) -> int:
        return sum(item.weights for item in self.items)

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors of all ranks."""
        return self.tensor_parallel_size * sum(item.rank_bytes for item in self.items)

    @property
    def source_bytes(self) -> int:
        """Bytes of the model at two bytes a weight."""
        return 2 * self.weights

    def bits_per_weight(self, role: Role | None = None) -> float:
        """Stored bits per weight of the items of a role, or of all; over all ranks."""
        chosen = [item for item in self.items if role in (None, item.tensor.role)]
        weights = sum(item.weights for item in chosen)
        bits = 8 * self.tensor_parallel_size * sum(item.rank_bytes for item in chosen)
        return bits / weights if weights else 0.0

    def peak_memory(self) -> int:
        """Estimated peak host memory in bytes; set by the largest tensor, not by the model."""
        largest = max(
            item.weights * (QUANTIZED_BYTES_PER_WEIGHT if item.quantized else KEPT_BYTES_PER_WEIGHT)
            + item.rank_bytes
            for item in self.items
        )
        return BASE_MEMORY + largest


def default_wint4_end_layer(config: ErnieConfig) -> int:
    """The published prefix for models of the 300B's depth, none for smaller ones."""
    deep = config.num_hidden_layers >= PREFIX_MIN_LAYERS
    return PUBLISHED_WINT4_END_LAYER if deep else -1


def make_plan(config: ErnieConfig, options: PlanOptions) -> Plan:
    """Resolve every choice for a model, or refuse it in one line before any work starts.

    Raises:
        CcqError: naming the flag or the tensor that does not fit the model or the target.
    """
    options.check(config)
    target, size = options.target, options.tensor_parallel_size
    layout = options.layout or Layout.prefix(config, options.format, options.wint4_end_layer)
    candidates = _candidates(target, config, layout)
    found = matching_rules(options.rules, candidates, options.format)
    formats, reasons = {}, {}
    for candidate in candidates:
        tensor, rule = candidate.tensor, found.get(candidate.tensor.name)
        formats[tensor.name] = rule.format if rule else candidate.default
        if tensor.is_expert and tensor.layer is not None:
            reasons[tensor.layer] = f"rule {rule.match}" if rule else candidate.reason
    experts = [c.tensor for c in candidates if c.tensor.is_expert]
    target.check_layers(layer_formats(formats, experts))
    _check_tensor_parallel(target, config, formats, size)
    items = tuple(
        _item(target, i, tensor, formats[tensor.name], size)
        for i, tensor in enumerate(config.tensors.values())
    )
    plan = Plan(
        config=config,
        options=options,
        format=options.format if experts else DENSE,
        items=items,
        shards=_split(items, options.max_shard_bytes),
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


def rule_forced_layers(config: ErnieConfig, format: str, rules: Sequence[Rule]) -> dict[int, str]:
    """Formats of the MoE layers that rules decide; the others are free for an allocation."""
    candidates = [Candidate(tensor, format) for tensor in config.tensors.values()]
    found = matching_rules(rules, candidates, format)
    return forced_layers(found, (c.tensor for c in candidates if c.tensor.is_expert))


def _candidates(target: Target, config: ErnieConfig, layout: Layout) -> list[Candidate]:
    """Every tensor with what it becomes where no rule speaks of it."""
    candidates = []
    for tensor in config.tensors.values():
        layer = tensor.layer
        if tensor.is_expert and layer is not None:
            candidates.append(Candidate(tensor, layout.formats[layer], layout.reason_of(layer)))
        elif tensor.is_dense:
            candidates.append(Candidate(tensor, DENSE))
        else:
            candidates.append(Candidate(tensor, target.kept_format(tensor)))
    return candidates


def rank_problem(
    target: Target, config: ErnieConfig, tensor: TensorSpec, format: str, size: int
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
    target: Target, config: ErnieConfig, formats: Mapping[str, str], size: int
) -> None:
    # Layers and experts repeat a few shapes; one of each kind is enough to look at.
    kinds: dict[tuple[str, tuple[int, ...], str], TensorSpec] = {}
    for tensor in config.tensors.values():
        kinds.setdefault((tensor.template, tensor.shape, formats[tensor.name]), tensor)

    def problem(ranks: int) -> str | None:
        for (_, _, format), tensor in kinds.items():
            found = rank_problem(target, config, tensor, format, ranks)
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
        most = max(config.num_attention_heads, size)
        works = [str(n) for n in range(1, most + 1) if not problem(n)]
        raise CcqError(
            f"--tensor-parallel-size {size} does not fit this model: {found}; sizes that work:"
            f" {', '.join(works)}"
        )


def _item(target: Target, index: int, tensor: TensorSpec, format: str, size: int) -> Item:
    cut, shape = tensor.cut, tensor.shape
    rank_shape = cut.rank_shape(shape, size) if cut and size > 1 else shape
    return Item(index, tensor, format, target.stored(tensor, format, rank_shape))


def _split(items: Sequence[Item], max_bytes: int) -> tuple[Shard, ...]:
    """Shards of at most `max_bytes`; the tensors of one matrix stay together."""
    groups: list[list[Item]] = []
    room = -1
    for item in items:
        if not groups or item.rank_bytes > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(item)
        room -= item.rank_bytes
    count = len(groups)
    return tuple(Shard(shard_name(i, count), tuple(group)) for i, group in enumerate(groups))
