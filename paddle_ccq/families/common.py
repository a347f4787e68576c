# SPDX-License-Identifier: Apache-2.0
"""What most families of mixture-of-experts models share: Hugging Face's names, [out, in].

A family's file says which keys of config.json hold the sizes (moe_config.py), and which tensors a
layer has (parts.py); all else is here. Canonical names are those on disk, but for routed experts,
whose gate and up are one canonical matrix, {layer}.mlp.experts.{expert}.gate_up_proj. Matrices of
linear layers are canonically [in, out]; everything else has the shape that it has on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from .family import Family, Naming
from .fields import Fields
from .moe_config import Keys, MoeConfig, parse_config
from .parts import Part
from .tensor import DOWN, UP_GATE, Cut, Role, Source, Stacked, Storage, TensorSpec, starred

NAMING = "pt"
# Names of a routed expert's matrices where it is packed, whatever its parts are called.
FUSED, FUSED_DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a family lie.

    Attributes:
        layer: (config, layer) -> the tensors of a layer but its routed experts.
        sparse: config -> the layers with routed experts, without those for multi-token prediction.
        prefix: config -> what the names of the text model begin with.
        experts: the module of a layer's experts.
        projections: gate, up and down of an expert.
        expert_width: (config, expert) -> its width, where they differ.
        stacked: the module that holds stacks of all experts' matrices, `gate_up_proj` and
            `down_proj`, in checkpoints that have them.
        outside: config -> tensors beside the text model's, by their whole names.
        extra_place: what the names of layers for multi-token prediction begin with, with {number}
            from 0 on; "" where they are numbered on from the others.
    """

    layer: Callable[[MoeConfig, int], Iterable[Part]]
    sparse: Callable[[MoeConfig], Iterable[int]]
    prefix: Callable[[MoeConfig], str] = lambda _: "model."
    experts: str = "mlp.experts"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    stacked: str | None = "mlp.experts"
    expert_width: Callable[[MoeConfig, int], int] = lambda config, _: config.moe_intermediate_size
    outside: Callable[[MoeConfig], Iterable[Part]] = lambda _: ()
    extra_place: str = ""


def make_family(
    name: str,
    architectures: Sequence[str],
    layout: Layout,
    *,
    keys: Keys | None = None,
    model_types: Sequence[str] = (),
) -> Family:
    """The family of these architectures; with `model_types`, of these alone."""
    read, places = keys or Keys(), {layout.experts, layout.stacked or layout.experts}
    # Where layers for multi-token prediction have a place of their own, all of it is theirs.
    apart = layout.extra_place.partition(".")[0]

    def parse(fields: Fields, family: Family, _: list[str] | None) -> MoeConfig:
        return parse_config(fields, family, read, layout.sparse)

    def tensors(config: MoeConfig) -> Iterator[TensorSpec]:
        return _tensors(config, layout)

    return Family(
        name,
        tuple(architectures),
        (Naming(NAMING, "", "Hugging Face names", format_tag="pt", dtype_key="torch_dtype"),),
        parse=parse,
        tensors=tensors,
        embedding=lambda config: f"{layout.prefix(config)}embed_tokens.weight",
        head="lm_head.weight",
        examples=f"model.layers.0.{layout.experts}.0.{layout.projections[0]}.weight",
        is_mtp=lambda name: bool(apart) and name.startswith(f"{apart}."),
        mtp_keys=read.extra_layers,
        model_types=tuple(model_types),
        keeps_others=True,
        is_mine=lambda name: any(f".{place}." in name for place in places),
        why_unexpected=_why_unexpected,
    )


def _why_unexpected(config: MoeConfig, _: str) -> str:
    layers = f"{min(config.sparse)} to {max(config.sparse)}" if config.sparse else "none"
    return (
        f"is not called for by config.json: {config.moe_num_experts} experts of width"
        f" {config.moe_intermediate_size} in {len(config.sparse)} layers ({layers})"
    )


def _tensors(config: MoeConfig, layout: Layout) -> Iterator[TensorSpec]:
    prefix, vocabulary = layout.prefix(config), config.vocab_size
    size = (vocabulary, config.hidden_size)
    yield _plain(Part(f"{prefix}embed_tokens.weight", size, Role.EMBEDDING))
    last = config.num_hidden_layers + config.num_nextn_predict_layers
    for layer in range(last):
        place = f"{prefix}layers.{{layer}}."
        if layer >= config.num_hidden_layers and layout.extra_place:
            place = layout.extra_place.format(number=layer - config.num_hidden_layers)
        for part in layout.layer(config, layer):
            yield _plain(part, place, layer)
        if config.is_moe_layer(layer):
            for expert in range(config.moe_num_experts):
                yield from expert_tensors(config, layout, place, layer, expert)
    yield _plain(Part(f"{prefix}norm.weight", (config.hidden_size,), Role.NORM))
    if not config.tie_word_embeddings:
        yield _plain(Part("lm_head.weight", size, Role.HEAD))
    for part in layout.outside(config):
        yield _plain(part)


_DENSE = frozenset({Role.ATTENTION, Role.MLP, Role.SHARED_EXPERT})


def _plain(part: Part, place: str = "", layer: int | None = None) -> TensorSpec:
    template = place + part.name if layer is not None else starred(part.name)
    name = (place + part.name).format(layer=layer) if layer is not None else part.name
    alias = (place + part.alias).format(layer=layer) if part.alias else None
    turned = part.role in _DENSE
    source = Source(name, part.shape, None, (alias,) if alias else ())
    storage = Storage((source,), turned, name.removesuffix(".weight"))
    return TensorSpec(
        name,
        template,
        part.role,
        part.shape[::-1] if turned else part.shape,
        part.name.removesuffix(".weight"),
        layer,
        sources={NAMING: storage},
        optional=part.optional,
    )


def expert_tensors(
    config: MoeConfig, layout: Layout, place: str, layer: int, expert: int
) -> Iterator[TensorSpec]:
    """The two matrices of a routed expert; `place` stands before the experts' module."""
    experts, hidden = config.moe_num_experts, config.hidden_size
    width = layout.expert_width(config, expert)
    template = f"{place}{layout.experts}.{{expert}}."
    own = template.format(layer=layer, expert=expert)
    stack = f"{place.format(layer=layer)}{layout.stacked}."
    gate, up, down = layout.projections
    both, one = (experts, 2 * width, hidden), (experts, hidden, width)

    def part(
        projection: str, shape: tuple[int, int], begin: int | None, stacked: Stacked | None
    ) -> Source:
        columns = None if begin is None else slice(begin, begin + shape[0])
        place = stacked if layout.stacked else None
        return Source(f"{own}{projection}.weight", shape, columns, stacked=place)

    first, second = (slice(begin, begin + width) for begin in (0, width))
    parts = (
        part(gate, (width, hidden), 0, Stacked(stack + FUSED, both, expert, first)),
        part(up, (width, hidden), width, Stacked(stack + FUSED, both, expert, second)),
    )
    last = part(down, (hidden, width), 0, Stacked(stack + FUSED_DOWN, one, expert))
    for packed, projection, shape, sources, cut in (
        (FUSED, UP_GATE, (hidden, 2 * width), parts, Cut(1, (width, width))),
        (FUSED_DOWN, DOWN, (width, hidden), (last,), Cut(0, (width,))),
    ):
        yield TensorSpec(
            f"{own}{packed}.weight",
            f"{template}{packed}.weight",
            Role.EXPERT,
            shape,
            projection,
            layer,
            expert,
            cut,
            {NAMING: Storage(sources, True, own + packed)},
        )
