# SPDX-License-Identifier: Apache-2.0
"""What a run will do, worked out from config.json alone: formats, output tensors, shards, sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..codec.formats import DEFAULT_EXPERTS, EXPERT_FORMATS, stored_order
from ..codec.row_order import FASTDEPLOY_2_1, PLAIN
from ..errors import CcqError
from ..families.tensor import Cut, Role, TensorSpec
from .config import ErnieConfig
from .fastdeploy import kept_format, output_specs, shape_problem
from .rules import Candidate, Rule, forced_layers, layer_formats, matching_rules, prefix_gap
from .safetensors_format import StoredSpec, shard_name, tensor_bytes

# FastDeploy's name for the row order, by --fastdeploy-layout.
ROW_ORDERS = {"2.1": FASTDEPLOY_2_1, "2.0": PLAIN}
DEFAULT_SHARD_BYTES = 5_000_000_000

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


@dataclass(frozen=True)
class Layout:
    """Formats of whole MoE layers that something other than a rule has chosen.

    Attributes:
        formats: of every MoE layer.
        reason: who chose, in a word, for the plan's table.
    """

    formats: Mapping[int, str]
    reason: str


@dataclass(frozen=True)
class PlanOptions:
    """All choices that decide a plan.

    Attributes:
        format: of routed experts.
        wint4_end_layer: MoE layers up to this one are wint4; -1 for none, None for the default of
            the model's depth.
        fastdeploy_layout: row order of WINT2, a key of ROW_ORDERS.
        tensor_parallel_size: number of rank folders.
        rules: formats of single matrices; they come before everything else.
        max_shard_bytes: of one file.
        layout: formats of whole MoE layers, in the place of a wint4 prefix.
        plugin_layout: wint4 layers need not be the first ones.
    """

    format: str = DEFAULT_EXPERTS
    wint4_end_layer: int | None = None
    fastdeploy_layout: str = "2.1"
    tensor_parallel_size: int = 1
    rules: Sequence[Rule] = ()
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    layout: Layout | None = None
    plugin_layout: bool = False


@dataclass(frozen=True)
class Plan:
    """The resolved job. Items are processed and written strictly in order."""

    config: ErnieConfig
    options: PlanOptions  # what was asked for; the other fields are what came of it
    format: str  # what the 2-bit MoE layers become; "wint8" for a model without MoE layers
    wint4_end_layer: int
    row_order: str
    tensor_parallel_size: int
    items: tuple[Item, ...]
    shards: tuple[Shard, ...]
    max_shard_bytes: int
    messages: tuple[str, ...]
    # Why each MoE layer's experts have their format.
    reasons: Mapping[int, str]

    def with_layout(self, layout: Layout) -> Plan:
        """The same choices with other formats of MoE layers, wint4 in any of them."""
        return build_plan(self.config, self.options, layout=layout, plugin_layout=True)

    @property
    def layer_formats(self) -> dict[int, str]:
        """The format of every MoE layer's experts."""
        experts = (item for item in self.items if item.tensor.is_expert)
        return {item.layer: item.format for item in experts if item.layer is not None}

    @property
    def wint4_layers(self) -> list[int]:
        """MoE layers in wint4."""
        return [layer for layer, format in self.layer_formats.items() if format == "wint4"]

    @property
    def needs_plugin(self) -> bool:
        """Whether the wint4 layers are no prefix: only our FastDeploy plugin reads a list."""
        return prefix_gap(self.layer_formats) is not None

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

    def not_converted(self) -> list[str]:
        """Dense linear layers that stay in bf16 (without `.weight`)."""
        return [
            item.tensor.stem
            for item in self.items
            if item.tensor.is_dense and item.format == "bf16"
        ]


def default_wint4_end_layer(config: ErnieConfig) -> int:
    """The published prefix for models of the 300B's depth, none for smaller ones."""
    deep = config.num_hidden_layers >= PREFIX_MIN_LAYERS
    return PUBLISHED_WINT4_END_LAYER if deep else -1


def build_plan(config: ErnieConfig, options: PlanOptions | None = None, **changes: Any) -> Plan:
    """Resolve every choice for a model, or refuse it in one line before any work starts.

    Args:
        options: the choices; `changes` are fields of PlanOptions that replace some of them.

    Raises:
        CcqError: naming the flag or the tensor that does not fit the model.
    """
    options = replace(options or PlanOptions(), **changes)
    _check_choices(config, options)
    format, wint4_end_layer, layout = options.format, options.wint4_end_layer, options.layout
    rules, tensor_parallel_size = options.rules, options.tensor_parallel_size
    messages = _messages(config)
    if wint4_end_layer is None:
        wint4_end_layer = -1 if layout else default_wint4_end_layer(config)
    candidates = _candidates(config, format, wint4_end_layer, layout)
    found = matching_rules(rules, candidates, format)
    resolved = {
        c.tensor.name: found[c.tensor.name].format if c.tensor.name in found else c.default
        for c in candidates
    }
    experts = [c.tensor for c in candidates if c.tensor.is_expert]
    if experts and (rules or layout):
        by_layer = layer_formats(resolved, experts)
        gap = prefix_gap(by_layer)
        if gap and not options.plugin_layout:
            raise CcqError(
                f"--rules: layer {gap[0]} would be wint4 after layer {gap[1]} is not; FastDeploy"
                " can't load that: wint4 layers must be the first MoE layers without a gap"
                " (--allow-plugin-layout, for our FastDeploy plugin, takes any)"
            )
        four = [layer for layer, chosen in by_layer.items() if chosen == "wint4"]
        first = experts[0].layer or 0
        # A prefix that ends before the first MoE layer holds nothing: keep what was asked for.
        # Of a list, too, FastDeploy without our plugin must not take a part for the whole.
        wint4_end_layer = four[-1] if four and not gap else min(wint4_end_layer, first - 1)
    _check_tensor_parallel(config, resolved, tensor_parallel_size)
    items = tuple(
        _item(i, tensor, resolved[tensor.name], tensor_parallel_size)
        for i, tensor in enumerate(config.tensors.values())
    )
    for item in items:
        if item.tensor.is_dense and item.format == "bf16":
            messages.append(
                "dense layers that stay in bf16 are listed in modules_to_not_convert, which needs"
                " FastDeploy 2.5 or later"
            )
            break
    reasons = {}
    for candidate in candidates:
        if candidate.tensor.is_expert:
            rule = found.get(candidate.tensor.name)
            reasons[candidate.tensor.layer] = f"rule {rule.match}" if rule else candidate.reason
    if not experts:
        format = "wint8"
        messages.append(
            "this model has no MoE layer, so nothing becomes 2-bit: its linear layers are wint8"
        )
    elif all(item.format == "wint4" for item in items if item.tensor.is_expert):
        messages.append("the wint4 prefix covers every MoE layer, so nothing becomes 2-bit")
    plan = Plan(
        config=config,
        options=options,
        format=format,
        wint4_end_layer=wint4_end_layer,
        row_order=stored_order(format, ROW_ORDERS[options.fastdeploy_layout]),
        tensor_parallel_size=tensor_parallel_size,
        items=items,
        shards=_split(items, options.max_shard_bytes),
        max_shard_bytes=options.max_shard_bytes,
        messages=tuple(messages),
        reasons=reasons,
    )
    if plan.needs_plugin:
        note = (
            "wint4 layers are no prefix: FastDeploy needs our plugin (FD_PLUGINS=paddle_ccq) and"
            " refuses these files without it"
        )
        plan = replace(plan, messages=(*plan.messages, note))
    return plan


def rule_forced_layers(config: ErnieConfig, format: str, rules: Sequence[Rule]) -> dict[int, str]:
    """Formats of the MoE layers that rules decide; the others are free for an allocation."""
    candidates = _candidates(config, format, -1, None)
    found = matching_rules(rules, candidates, format)
    return forced_layers(found, (c.tensor for c in candidates if c.tensor.is_expert))


def _check_choices(config: ErnieConfig, options: PlanOptions) -> None:
    format, layout = options.format, options.fastdeploy_layout
    end_layer, max_shard_bytes = options.wint4_end_layer, options.max_shard_bytes
    if format not in EXPERT_FORMATS:
        raise CcqError(f"--format {format}: not one of {', '.join(EXPERT_FORMATS)}")
    if layout not in ROW_ORDERS:
        raise CcqError(f"--fastdeploy-layout {layout}: not one of {', '.join(ROW_ORDERS)}")
    last = config.num_hidden_layers - 1
    if end_layer is not None and not -1 <= end_layer <= last:
        raise CcqError(
            f"--wint4-end-layer {end_layer}: this model's layers are 0 to {last} (-1 for none)"
        )
    if max_shard_bytes < 1:
        raise CcqError(f"--max-shard-size: {max_shard_bytes} bytes is no size")


def _messages(config: ErnieConfig) -> list[str]:
    """What FastDeploy will not do with this model, though the checkpoint can be written."""
    messages = []
    moe = config.moe_layers()
    expected = list(range(config.moe_layer_start_index, config.num_hidden_layers))
    if moe and moe != expected:
        messages.append(
            f"FastDeploy takes every layer from {expected[0]} on as a MoE layer, this model"
            " doesn't; FastDeploy can't load it"
        )
    if config.vocab_size % 64:
        messages.append(
            f"vocabulary of {config.vocab_size}: FastDeploy pads to a multiple of 64 and refuses"
            " embeddings of another size"
        )
    return messages


def _candidates(
    config: ErnieConfig, format: str, wint4_end_layer: int, layout: Layout | None
) -> list[Candidate]:
    """Every tensor with what it becomes where no rule speaks of it."""
    candidates = []
    for tensor in config.tensors.values():
        layer = tensor.layer
        if tensor.is_expert and layer is not None:
            if layout is not None:
                default, reason = layout.formats[layer], layout.reason
            elif layer <= wint4_end_layer:
                default, reason = "wint4", "prefix"
            else:
                default, reason = format, "--format"
            candidates.append(Candidate(tensor, default, reason))
        elif tensor.is_dense:
            candidates.append(Candidate(tensor, "wint8"))
        else:
            candidates.append(Candidate(tensor, kept_format(tensor)))
    return candidates


def rank_problem(config: ErnieConfig, tensor: TensorSpec, format: str, size: int) -> str | None:
    """Why one of `size` ranks cannot hold its part of a tensor; None if it can."""
    cut = tensor.cut
    if cut is None or size == 1:
        return shape_problem(format, tensor.shape)
    if not cut.fits(size):
        if tensor.role is Role.ATTENTION:
            heads = f"{config.num_attention_heads} query and {config.num_key_value_heads} key heads"
            return f"{heads} can't be shared out evenly over {size} ranks"
        return f"{cut.parts[0]} can't be cut into {size} equal parts"
    return shape_problem(format, cut.rank_shape(tensor.shape, size))


def _check_tensor_parallel(config: ErnieConfig, resolved: dict[str, str], size: int) -> None:
    # Layers and experts repeat a few shapes; one of each kind is enough to look at.
    kinds: dict[tuple[str, tuple[int, ...], str], TensorSpec] = {}
    for tensor in config.tensors.values():
        kinds.setdefault((tensor.template, tensor.shape, resolved[tensor.name]), tensor)

    def problem(ranks: int) -> str | None:
        for (_, _, format), tensor in kinds.items():
            found = rank_problem(config, tensor, format, ranks)
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


def _item(index: int, tensor: TensorSpec, format: str, size: int) -> Item:
    cut, shape = tensor.cut, tensor.shape
    rank_shape = cut.rank_shape(shape, size) if cut and size > 1 else shape
    return Item(index, tensor, format, output_specs(tensor, format, rank_shape))


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
