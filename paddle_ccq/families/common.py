# SPDX-License-Identifier: Apache-2.0
"""What most families of mixture-of-experts models share: Hugging Face's names, [out, in].

A family's file says which keys of config.json hold the sizes, and which tensors a layer has; all
else is here. Canonical names are those on disk, but for routed experts, whose gate and up are one
canonical matrix, {layer}.mlp.experts.{expert}.gate_up_proj. Matrices of linear layers are
canonically [in, out]; everything else has the shape that it has on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .config import CONFIG_FILE, FLOAT_TYPES, MAX_EXPERTS, MAX_LAYERS, MAX_WIDTH, ModelConfig
from .family import Family, Naming
from .fields import Fields, show
from .tensor import DOWN, UP_GATE, Cut, Role, Source, Stacked, Storage, TensorSpec, starred

NAMING = "pt"
# Names of a routed expert's matrices where it is packed, whatever its parts are called.
FUSED, FUSED_DOWN = "gate_up_proj", "down_proj"
# Far above any published number of layers for multi-token prediction.
MAX_EXTRA_LAYERS = 16


# How families call the number of routed experts, their own name first.
NUMBER_FIRST = ("num_experts", "num_local_experts", "n_routed_experts")
ROUTED_FIRST = ("n_routed_experts", "num_experts", "num_local_experts")
LOCAL_FIRST = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Keys:
    """Keys of config.json, the first that is there counts; 0 or an absent key where none is.

    A family's own name stands first: where none is there, the error names it.

    Attributes:
        sizes: further sizes by key, each with its default; None: it must be there.
        nested: the object that the text model's keys lie in, where it is there.
    """

    experts: tuple[str, ...] = NUMBER_FIRST
    width: tuple[str, ...] = ("moe_intermediate_size",)
    dense_width: tuple[str, ...] = ("intermediate_size",)
    extra_layers: tuple[str, ...] = ("num_nextn_predict_layers",)
    sizes: Mapping[str, int | None] = field(default_factory=dict)
    nested: str = "text_config"


@dataclass(frozen=True, kw_only=True)
class MoeConfig(ModelConfig):
    """Sizes of a model of one of these families.

    Attributes:
        values: the fields of the text model, as config.json has them.
        sizes: those of Keys.sizes.
        sparse: which layers have routed experts, those for multi-token prediction included.
    """

    head_dim: int
    values: Mapping[str, Any] = field(repr=False, compare=False)
    sizes: Mapping[str, int]
    sparse: frozenset[int]

    def is_moe_layer(self, layer: int) -> bool:
        return layer in self.sparse

    def with_tie(self, tied: bool) -> MoeConfig:
        """As for all models, but config.json stays as it is: loaders have this family's default."""
        return replace(self, tie_word_embeddings=tied, tie_stated=True)

    def without_mtp(self) -> MoeConfig:
        rest = self.sparse - set(self.prediction_layers)
        return replace(super().without_mtp(), sparse=rest)

    def moe_layers(self) -> list[int]:
        return sorted(self.sparse)

    @property
    def prediction_layers(self) -> range:
        """Those of all these families do."""
        return range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers)

    def flag(self, key: str, default: bool = False) -> bool:
        """A field of the text model that is true or false."""
        return self.fields.boolean(key, default)

    def layers_in(self, key: str) -> list[int]:
        """A field of the text model that is a list of layers; empty where it is absent."""
        value = self.fields.get(key, [])
        if not isinstance(value, list) or not all(type(number) is int for number in value):
            raise self.fields.fail(key, f"{show(value)} is not a list of layers")
        return value

    @property
    def fields(self) -> Fields:
        """The fields of the text model, for a family's own."""
        return Fields(dict(self.values), CONFIG_FILE)


@dataclass(frozen=True)
class Part:
    """A tensor of a layer, or outside of layers, by its name there.

    Attributes:
        shape: as it is stored.
        optional: a checkpoint may lack it.
        alias: the name in checkpoints that transformers writes in its own layout.
    """

    name: str
    shape: tuple[int, ...]
    role: Role = Role.OTHER
    optional: bool = False
    alias: str = ""


def linear(name: str, rows: int, columns: int, role: Role = Role.ATTENTION) -> Part:
    """The matrix of a linear layer, [out, in]."""
    return Part(f"{name}.weight", (rows, columns), role)


def norm(name: str, size: int) -> Part:
    return Part(f"{name}.weight", (size,), Role.NORM)


def swiglu(name: str, hidden: int, width: int, role: Role) -> Iterator[Part]:
    """Gate, up and down of an MLP."""
    yield linear(f"{name}.gate_proj", width, hidden, role)
    yield linear(f"{name}.up_proj", width, hidden, role)
    yield linear(f"{name}.down_proj", hidden, width, role)


def grouped_query(config: MoeConfig, *, bias: bool = False, gated: bool = False) -> Iterator[Part]:
    """Queries, keys, values and output of attention; `gated`: queries have a gate of their size."""
    hidden, head = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    for name, rows in (("q_proj", q * (1 + gated)), ("k_proj", kv), ("v_proj", kv)):
        yield linear(f"self_attn.{name}", rows, hidden)
        if bias:
            yield Part(f"self_attn.{name}.bias", (rows,))
    yield linear("self_attn.o_proj", hidden, q)


def router(config: MoeConfig, place: str = "mlp.gate", alias: str = "") -> Part:
    shape = (config.moe_num_experts, config.hidden_size)
    return Part(f"{place}.weight", shape, Role.ROUTER, alias=alias)


def correction_bias(config: MoeConfig, name: str, alias: str = "") -> Part:
    return Part(name, (config.moe_num_experts,), Role.CORRECTION_BIAS, alias=alias)


def layer_norms(config: MoeConfig) -> Iterator[Part]:
    yield norm("input_layernorm", config.hidden_size)
    yield norm("post_attention_layernorm", config.hidden_size)


def prediction_head(config: MoeConfig) -> Iterator[Part]:
    """What DeepSeek's layers for multi-token prediction have beside those of any layer."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    yield norm("enorm", hidden)
    yield norm("hnorm", hidden)
    yield Part("eh_proj.weight", (hidden, 2 * hidden))
    yield norm("shared_head.norm", hidden)
    # Copies of the model's own, which some checkpoints leave out.
    yield Part("embed_tokens.weight", (vocabulary, hidden), optional=True)
    yield Part("shared_head.head.weight", (vocabulary, hidden), optional=True)


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
        return _parse(fields, family, read, layout)

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


# --- config.json ------------------------------------------------------------------------------


def _parse(fields: Fields, family: Family, keys: Keys, layout: Layout) -> MoeConfig:
    raw, where = fields.values, fields.where
    nested = raw.get(keys.nested)
    if nested is not None:
        if not isinstance(nested, Mapping):
            raise fields.fail(keys.nested, f"{show(nested)} is not an object")
        # What is stated outside holds where the nested object is silent.
        said = {key: value for key, value in nested.items() if value is not None}
        fields = Fields({**raw, **said}, f"{where}: {keys.nested}")
    hidden = fields.integer("hidden_size", 1, MAX_WIDTH)
    heads = fields.integer("num_attention_heads", 1, 1 << 16)
    experts = _first(fields, keys.experts, 0, MAX_EXPERTS)
    layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    config = MoeConfig(
        family=family,
        architectures=tuple(raw["architectures"]),
        model_type=str(fields.get("model_type", "")),
        vocab_size=fields.integer("vocab_size", 1, MAX_WIDTH),
        hidden_size=hidden,
        intermediate_size=_first(fields, keys.dense_width, 1, MAX_WIDTH, 1),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", 1, 1 << 16, heads),
        head_dim=fields.integer("head_dim", 1, 1 << 16, max(hidden // heads, 1)),
        # Where it is not stated, transformers' classes of these families have a head.
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        tie_stated=fields.get("tie_word_embeddings", None) is not None,
        moe_num_experts=experts,
        # Without experts nothing is chosen; what is to become smaller says the target.
        moe_k=_first(fields, ("num_experts_per_tok", "moe_topk"), 1, experts, 1) if experts else 0,
        moe_intermediate_size=_first(fields, keys.width, 1, MAX_WIDTH) if experts else 0,
        num_nextn_predict_layers=_first(fields, keys.extra_layers, 0, MAX_EXTRA_LAYERS, 0),
        dtype=read_dtype(fields),
        raw=raw,
        values=fields.values,
        sizes={
            key: fields.integer(key, 0, MAX_WIDTH, *([] if default is None else [default]))
            for key, default in keys.sizes.items()
        },
        sparse=frozenset(),
    )
    sparse = frozenset(layout.sparse(config)) if experts else frozenset()
    extra = frozenset(config.prediction_layers) if sparse else frozenset()
    return replace(config, sparse=sparse | extra)


def _first(
    fields: Fields, names: Sequence[str], low: int, high: int, default: int | None = None
) -> int:
    """The value of the first key that is there; two that differ are refused."""
    stated = [name for name in names if fields.get(name, None) is not None]
    if not stated:
        # A null is that key's own fault.
        name = next((name for name in names if name in fields.values), names[0])
        return fields.integer(name, low, high, *([] if default is None else [default]))
    values = [fields.integer(name, low, high) for name in stated]
    if len(set(values)) > 1:
        raise fields.fail(stated[0], f"{values[0]}, but {stated[1]} says {values[1]}")
    return values[0]


def read_dtype(fields: Fields) -> str:
    """The type of weights that are not quantized; bfloat16 where none is stated."""
    value = fields.get("dtype", None) or fields.get("torch_dtype", "bfloat16")
    if value not in FLOAT_TYPES:
        raise fields.fail("dtype", f"{show(value)} is not one of {', '.join(FLOAT_TYPES)}")
    return value


# --- tensors ----------------------------------------------------------------------------------


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
