# SPDX-License-Identifier: Apache-2.0
"""ERNIE-4.5's config.json, checked field by field before anything relies on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import FLOAT_TYPES, MAX_EXPERTS, MAX_LAYERS, MAX_WIDTH, ModelConfig
from ..family import Family
from ..fields import Fields, show
from . import config_checks, config_keys


@dataclass(frozen=True, kw_only=True)
class ErnieConfig(ModelConfig):
    """Shape and arithmetic of an ERNIE-4.5 text model; defaults are those of the ERNIE classes."""

    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    moe_num_shared_experts: int
    moe_layer_start_index: int
    moe_layer_end_index: int  # the last MoE layer, never -1
    moe_layer_interval: int
    moe_norm_min: float
    max_position_embeddings: int

    def stated(self) -> dict[str, Any]:
        """Values whose defaults differ between loaders, by key, to be spelled out in an output."""
        values: dict[str, Any] = {
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
        }
        if self.moe_num_experts:
            values |= {
                "moe_num_shared_experts": self.moe_num_shared_experts,
                "moe_layer_start_index": self.moe_layer_start_index,
                "moe_layer_interval": self.moe_layer_interval,
                "moe_use_aux_free": True,
            }
        return values

    def spell_out(self, result: dict[str, Any]) -> None:
        """Add to an output's fields what they leave open, so that all loaders build this model."""
        for key, value in (("model_type", self.model_type), *self.stated().items()):
            if result.get(key) is None:
                result[key] = value
        if not self.moe_num_experts and self.model_type == "ernie4_5_moe":
            # transformers' class of this name always has experts.
            result["model_type"] = "ernie4_5"
            result["architectures"] = ["Ernie4_5_ForCausalLM"]

    def is_moe_layer(self, layer: int) -> bool:
        return (
            self.moe_num_experts > 0
            and (layer + 1) % self.moe_layer_interval == 0
            and self.moe_layer_start_index <= layer <= self.moe_layer_end_index
        )

    @property
    def q_size(self) -> int:
        """Output columns of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Output columns of all key heads together (as many as of all value heads)."""
        return self.num_key_value_heads * self.head_dim

    @property
    def shared_intermediate_size(self) -> int:
        """Inner width of the shared experts, which are stored as one MLP; 0 without them."""
        return self.moe_num_shared_experts * self.moe_intermediate_size


def parse(fields: Fields, family: Family, problems: list[str] | None) -> ErnieConfig:
    """The config of a model of the family; see Family.parse."""
    fields.values = config_keys.unified(fields.values, fields.fail)
    theta = config_checks.rope_theta(fields)
    experts = fields.integer("moe_num_experts", 0, MAX_EXPERTS, 0)
    config_checks.refuse_unsupported(fields, experts > 0, problems)
    hidden = fields.integer("hidden_size", 1, MAX_WIDTH)
    layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    heads = fields.integer("num_attention_heads", 1, 1 << 16)
    kv_heads = fields.integer("num_key_value_heads", 1, heads, default=heads)
    if heads % kv_heads:
        raise fields.fail("num_key_value_heads", f"{kv_heads} does not divide {heads} heads")
    if fields.get("head_dim", None) is None and hidden % heads:
        raise fields.fail("head_dim", f"absent, and {heads} heads do not divide hidden_size")
    head_dim = fields.integer("head_dim", 1, 1 << 16, default=hidden // heads)
    if head_dim % 2:
        raise fields.fail("head_dim", f"{head_dim} is odd; rotary positions need pairs")
    config = ErnieConfig(
        family=family,
        architectures=tuple(fields.get("architectures")),
        model_type=config_checks.model_type(fields, experts > 0),
        vocab_size=fields.integer("vocab_size", 1, MAX_WIDTH),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", 1, MAX_WIDTH),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-5),
        rope_theta=theta,
        # The default of transformers' classes, where the weights hold no head.
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
        **_moe(fields, experts, layers),
        num_nextn_predict_layers=fields.integer("num_nextn_predict_layers", 0, MAX_LAYERS, 0),
        max_position_embeddings=fields.integer("max_position_embeddings", 1, 1 << 31, 131072),
        dtype=_dtype(fields),
        raw=fields.values,
        tie_stated=fields.get("tie_word_embeddings", None) is not None,
        notes=tuple(config_checks.notes(fields)),
    )
    config_checks.check_derived(fields, config.head_dim, config.shared_intermediate_size)
    moe = [config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)]
    config_checks.check_layers(fields, moe)
    return config


def _moe(fields: Fields, experts: int, layers: int) -> dict[str, Any]:
    if not experts:
        return {
            "moe_num_experts": 0,
            "moe_k": 0,
            "moe_intermediate_size": 0,
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": layers - 1,
            "moe_layer_interval": 1,
            "moe_norm_min": 1e-12,
        }
    end = fields.integer("moe_layer_end_index", -1, MAX_LAYERS, -1)
    return {
        "moe_num_experts": experts,
        "moe_k": fields.integer("moe_k", 1, experts),
        "moe_intermediate_size": fields.integer("moe_intermediate_size", 1, MAX_WIDTH),
        "moe_num_shared_experts": fields.integer("moe_num_shared_experts", 0, 64, 0),
        "moe_layer_start_index": fields.integer("moe_layer_start_index", 0, MAX_LAYERS, 1),
        "moe_layer_end_index": layers - 1 if end == -1 else min(end, layers - 1),
        "moe_layer_interval": fields.integer("moe_layer_interval", 1, MAX_LAYERS, 1),
        "moe_norm_min": fields.positive("moe_norm_min", 1e-12),
    }


def _dtype(fields: Fields) -> str:
    for key in ("dtype", "torch_dtype"):
        value = fields.get(key, "bfloat16")
        if value not in FLOAT_TYPES:
            raise fields.fail(key, f"{show(value)} is not one of {', '.join(FLOAT_TYPES)}")
    both = fields.get("dtype", None), fields.get("torch_dtype", None)
    if None not in both and both[0] != both[1]:
        raise fields.fail("dtype", f"{both[0]}, but torch_dtype says {both[1]}")
    return both[0] or both[1] or "bfloat16"
