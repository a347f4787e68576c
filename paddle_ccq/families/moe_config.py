# SPDX-License-Identifier: Apache-2.0
"""The config of a mixture-of-experts model of most families, and the keys that it is read from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .config import CONFIG_FILE, FLOAT_TYPES, MAX_EXPERTS, MAX_LAYERS, MAX_WIDTH, ModelConfig
from .family import Family
from .fields import Fields, show

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


def parse_config(
    fields: Fields,
    family: Family,
    keys: Keys,
    sparse_layers: Callable[[MoeConfig], Iterable[int]],
) -> MoeConfig:
    """The config of a model; `sparse_layers` of it, without those for multi-token prediction.

    Raises:
        CcqError: for a key that is missing or has a value that no such model can have.
    """
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
    sparse = frozenset(sparse_layers(config)) if experts else frozenset()
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
