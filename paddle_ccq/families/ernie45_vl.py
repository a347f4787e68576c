# SPDX-License-Identifier: Apache-2.0
"""ERNIE-4.5-VL: text and vision experts of two widths in one list, two routers, a vision encoder.

Names and shapes are those that transformers' Ernie4_5_VLMoe classes write in the published form;
published checkpoints have the vision encoder outside of `model`. In both, routers are stored as
[hidden, experts]. The vision encoder and the resampler are kept as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from .common import Layout, make_family
from .config import MAX_EXPERTS, MAX_LAYERS, MAX_WIDTH
from .family import Family
from .fields import Fields, show
from .moe_config import Keys, MoeConfig
from .parts import Part, grouped_query, layer_norms, swiglu
from .tensor import Role

TEXT_WIDTH, VISION_WIDTH = "moe_intermediate_size", "vision_moe_intermediate_size"
EACH = "experts_of_each_kind"
BEGIN, END, STEP = "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"
KEYS = Keys(
    experts=("moe_num_experts",),
    sizes={VISION_WIDTH: None, EACH: None, BEGIN: 1, END: MAX_LAYERS, STEP: 1,
           "moe_num_shared_experts": 0},
)  # fmt: skip
# What transformers' classes have where a vision_config is silent.
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_merge_size": 2,
}


def sparse(config: MoeConfig) -> Iterator[int]:
    """The layers with experts of both kinds."""
    kinds = config.values.get("mlp_layer_types")
    for layer in range(config.num_hidden_layers):
        if isinstance(kinds, list) and layer < len(kinds):
            found = kinds[layer] == "sparse"
        else:
            inside = config.sizes[BEGIN] <= layer <= config.sizes[END]
            found = inside and (layer + 1) % max(config.sizes[STEP], 1) == 0
        if found:
            yield layer


def width(config: MoeConfig, expert: int) -> int:
    """Text experts come first."""
    of_text = expert < config.sizes[EACH]
    return config.moe_intermediate_size if of_text else config.sizes[VISION_WIDTH]


def layer(config: MoeConfig, number: int) -> Iterator[Part]:
    """All tensors of a layer but its routed experts.

    Each kind of experts has its own router [hidden, experts]; the bias holds a row for each kind.
    """
    hidden, each = config.hidden_size, config.sizes[EACH]
    yield from layer_norms(config)
    yield from grouped_query(config)
    if not config.is_moe_layer(number):
        yield from swiglu("mlp", hidden, config.intermediate_size, Role.MLP)
        return
    yield Part("mlp.gate.weight", (hidden, each), Role.ROUTER)
    yield Part("mlp.gate.weight_1", (hidden, each), Role.ROUTER)
    yield Part("mlp.moe_statics.e_score_correction_bias", (2, each), Role.CORRECTION_BIAS)
    shared = config.sizes["moe_num_shared_experts"] * config.moe_intermediate_size
    if shared:
        yield from swiglu("mlp.shared_experts", hidden, shared, Role.SHARED_EXPERT)


def outside(config: MoeConfig) -> Iterator[Part]:
    """The vision encoder, and the resampler that brings its output into the text model."""
    stated = config.raw.get("vision_config")
    stated = stated if isinstance(stated, Mapping) else {}
    size = VISION | {k: v for k, v in stated.items() if isinstance(v, int) and 0 < v < MAX_WIDTH}
    hidden = size["hidden_size"]
    inner = size.get("intermediate_size", size.get("mlp_ratio", 4) * hidden)
    patch = size["in_channels"] * size["patch_size"] ** 2

    def both(place: str, name: str, *shape: int) -> Iterator[Part]:
        for part, dimensions in (("weight", shape), ("bias", shape[:1])):
            own = f"{place}.{name}.{part}"
            alias = "" if own.startswith("model.") else f"model.{own}"
            yield Part(own, dimensions, alias=alias)

    encoder = "vision_model"
    yield Part(f"{encoder}.patch_embed.proj.weight", (hidden, patch),
               alias=f"model.{encoder}.patch_embed.proj.weight")  # fmt: skip
    for block in range(min(size["depth"], MAX_LAYERS)):
        place = f"{encoder}.blocks.{block}"
        yield from both(place, "norm1", hidden)
        yield from both(place, "norm2", hidden)
        yield from both(place, "attn.qkv", 3 * hidden, hidden)
        yield from both(place, "attn.proj", hidden, hidden)
        yield from both(place, "mlp.fc1", inner, hidden)
        yield from both(place, "mlp.fc2", hidden, inner)
    yield from both(encoder, "ln", hidden)
    merged = hidden * size["spatial_merge_size"] ** 2
    resampler = "model.resampler_model"
    for name, inputs in (
        ("spatial_linear", merged),
        ("temporal_linear", merged * size["temporal_merge_size"]),
    ):
        yield from both(resampler, f"{name}.0", merged, inputs)
        yield from both(resampler, f"{name}.2", merged, merged)
        yield from both(resampler, f"{name}.3", merged)
    yield from both(resampler, "mlp", config.hidden_size, merged)
    yield Part(f"{resampler}.after_norm.weight", (config.hidden_size,))


# --- config.json ------------------------------------------------------------------------------


def _two(fields: Fields, key: str, low: int, high: int) -> tuple[int, int]:
    """A value of text and of vision, which may be one number for both."""
    value = fields.get(key)
    values = value if isinstance(value, list) else [value, value]
    if len(values) != 2:
        raise fields.fail(key, f"{show(value)} is not one number for text and one for vision")
    first, second = (Fields({key: one}, fields.where).integer(key, low, high) for one in values)
    return first, second


def _same(fields: Fields, key: str, found: tuple[int, int], what: str) -> int:
    if found[0] != found[1]:
        raise fields.fail(key, f"{list(found)}: models with {what} are not read")
    return found[0]


def _plain(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """config.json with one number in place of every pair, and without the nested text model."""
    nested = raw.get("text_config")
    if nested is not None and not isinstance(nested, Mapping):
        raise Fields(dict(raw), where).fail("text_config", f"{show(nested)} is not an object")
    said = {key: value for key, value in (nested or {}).items() if value is not None}
    fields = Fields({**raw, **said, "text_config": None}, where)
    values = dict(fields.values)
    widths = _two(fields, TEXT_WIDTH, 1, MAX_WIDTH)
    each = _same(
        fields,
        "moe_num_experts",
        _two(fields, "moe_num_experts", 1, MAX_EXPERTS // 2),
        "different numbers of text and vision experts",
    )
    values |= {TEXT_WIDTH: widths[0], VISION_WIDTH: widths[1], "moe_num_experts": 2 * each}
    values |= {EACH: each, "num_experts_per_tok": fields.get("moe_k", None)}
    last = fields.integer("num_hidden_layers", 1, MAX_LAYERS) - 1
    for key, low in ((BEGIN, 0), (END, -1)):
        if fields.get(key, None) is not None:
            # The published ends lie behind the last layer, each at another place; -1 is the last.
            found = [min(value, last) for value in _two(fields, key, low, MAX_LAYERS)]
            ends = tuple(last if value == -1 else value for value in found)
            values[key] = _same(fields, key, ends, "layers that have experts of one kind alone")
    return values


def _parse(fields: Fields, family: Family, problems: list[str] | None) -> MoeConfig:
    raw = fields.values
    config = _BASE.parse(Fields(_plain(raw, fields.where), fields.where), family, problems)
    return replace(config, raw=raw)


_BASE = make_family(
    "ERNIE-4.5-VL",
    ["Ernie4_5_VLMoeForConditionalGeneration", "Ernie4_5_VL_MoeForConditionalGeneration"],
    Layout(layer, sparse, outside=outside, stacked=None, expert_width=width),
    keys=KEYS,
)
FAMILY = replace(
    _BASE,
    parse=_parse,
    unread={
        "ernie.": "this is Paddle's naming, which is read of ERNIE-4.5's text models alone; use the"
        " checkpoint in Hugging Face's naming, whose name ends in -PT",
        "model.language_model.": "this is transformers' own form, which is not read here;"
        " save the model without save_original_format=False",
    },
)
