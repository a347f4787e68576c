# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5-MoE, the text model alone or with vision: linear attention in three of four layers.

Names and shapes are those of transformers' Qwen3_5Moe classes. Published checkpoints hold the
experts of a layer as stacks. The names of its layer for multi-token prediction are those that
vLLM's qwen3_5_mtp.py reads; checkpoints without it are as good.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .common import Layout, make_family
from .config import CONFIG_FILE, MAX_LAYERS, MAX_WIDTH
from .fields import Fields
from .moe_config import Keys, MoeConfig
from .parts import Part, grouped_query, layer_norms, linear, norm, router, swiglu
from .tensor import Role

TEXT, WITH_VISION = "Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"
KEYS = Keys(
    extra_layers=("mtp_num_hidden_layers", "num_nextn_predict_layers"),
    sizes={
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 0,
        "full_attention_interval": 4,
    },
)


def prefix(config: MoeConfig) -> str:
    """The text model alone is the module `model`; beside vision it is `model.language_model`."""
    return "model." if config.architectures[0] == TEXT else "model.language_model."


def is_full_attention(config: MoeConfig, number: int) -> bool:
    """Whether a layer has softmax attention instead of the gated delta net.

    `layer_types` decides where it lists the layer, else full_attention_interval; layers for
    multi-token prediction always have it.
    """
    kinds = config.values.get("layer_types")
    if isinstance(kinds, list) and number < len(kinds):
        return kinds[number] == "full_attention"
    return number >= config.num_hidden_layers or (
        (number + 1) % max(config.sizes["full_attention_interval"], 1) == 0
    )


def linear_attention(config: MoeConfig) -> Iterator[Part]:
    """A gated delta net."""
    sizes, hidden = config.sizes, config.hidden_size
    value_heads, width = sizes["linear_num_value_heads"], sizes["linear_value_head_dim"]
    values = value_heads * width
    keys = sizes["linear_num_key_heads"] * sizes["linear_key_head_dim"]
    place = "linear_attn"
    yield Part(f"{place}.A_log", (value_heads,))
    yield Part(f"{place}.dt_bias", (value_heads,))
    yield Part(f"{place}.conv1d.weight", (2 * keys + values, 1, sizes["linear_conv_kernel_dim"]))
    yield linear(f"{place}.in_proj_qkv", 2 * keys + values, hidden)
    yield linear(f"{place}.in_proj_z", values, hidden)
    yield linear(f"{place}.in_proj_b", value_heads, hidden)
    yield linear(f"{place}.in_proj_a", value_heads, hidden)
    yield norm(f"{place}.norm", width)
    yield linear(f"{place}.out_proj", hidden, values)


def layer(config: MoeConfig, number: int) -> Iterator[Part]:
    """All tensors of a layer but its routed experts.

    The shared expert is weighted by a gate [1, hidden] of its own.
    """
    hidden, shared = config.hidden_size, config.sizes["shared_expert_intermediate_size"]
    yield from layer_norms(config)
    if is_full_attention(config, number):
        yield from grouped_query(config, bias=config.flag("attention_bias"), gated=True)
        yield norm("self_attn.q_norm", config.head_dim)
        yield norm("self_attn.k_norm", config.head_dim)
    else:
        yield from linear_attention(config)
    yield router(config)
    if shared:
        yield from swiglu("mlp.shared_expert", hidden, shared, Role.SHARED_EXPERT)
        yield Part("mlp.shared_expert_gate.weight", (1, hidden))


def outside(config: MoeConfig) -> Iterator[Part]:
    """What stands around the layer for multi-token prediction, and the vision encoder."""
    hidden = config.hidden_size
    if config.num_nextn_predict_layers:
        yield Part("mtp.fc.weight", (hidden, 2 * hidden))
        for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
            yield norm(f"mtp.{name}", hidden)
    vision = config.raw.get("vision_config")
    if config.architectures[0] != TEXT and isinstance(vision, Mapping):
        yield from vision_tower(vision)


def vision_tower(vision: Mapping[str, object]) -> Iterator[Part]:
    """The vision encoder by its config, whose keys have the defaults of transformers' class."""
    default = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "in_channels": 3,
        "num_position_embeddings": 2304,
        "out_hidden_size": 3584,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    fields = Fields(dict(vision), f"{CONFIG_FILE}: vision_config")
    size = {key: fields.integer(key, 1, MAX_WIDTH, value) for key, value in default.items()}
    hidden, inner, out = size["hidden_size"], size["intermediate_size"], size["out_hidden_size"]
    merged, patch = hidden * size["spatial_merge_size"] ** 2, size["patch_size"]

    def both(name: str, *shape: int) -> Iterator[Part]:
        yield Part(f"model.visual.{name}.weight", shape)
        yield Part(f"model.visual.{name}.bias", shape[:1])

    yield from both(
        "patch_embed.proj", hidden, size["in_channels"], size["temporal_patch_size"], patch, patch
    )
    yield Part("model.visual.pos_embed.weight", (size["num_position_embeddings"], hidden))
    for block in range(min(size["depth"], MAX_LAYERS)):
        yield from both(f"blocks.{block}.norm1", hidden)
        yield from both(f"blocks.{block}.norm2", hidden)
        yield from both(f"blocks.{block}.attn.qkv", 3 * hidden, hidden)
        yield from both(f"blocks.{block}.attn.proj", hidden, hidden)
        yield from both(f"blocks.{block}.mlp.linear_fc1", inner, hidden)
        yield from both(f"blocks.{block}.mlp.linear_fc2", hidden, inner)
    yield from both("merger.norm", hidden)
    yield from both("merger.linear_fc1", merged, merged)
    yield from both("merger.linear_fc2", out, merged)


FAMILY = make_family(
    "Qwen3.5-MoE",
    [TEXT, WITH_VISION],
    Layout(
        layer,
        lambda config: range(config.num_hidden_layers),
        prefix=prefix,
        outside=outside,
        extra_place="mtp.layers.{number}.",
    ),
    keys=KEYS,
)
