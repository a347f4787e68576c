# SPDX-License-Identifier: Apache-2.0
"""The model description in config.json, checked field by field before anything relies on it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CcqError
from .safetensors_io import load_json

CONFIG_FILE = "config.json"
ARCHITECTURES = ("Ernie4_5_MoeForCausalLM", "Ernie4_5_ForCausalLM", "Ernie4_5ForCausalLM")
FLOAT_TYPES = ("bfloat16", "float16", "float32")

# Far above any published model; they bound the work that a hostile file can ask for.
MAX_CONFIG_BYTES = 16 << 20
MAX_LAYERS = 512
MAX_EXPERTS = 1024
MAX_WIDTH = 1 << 24


@dataclass(frozen=True)
class ErnieConfig:
    """Shape and arithmetic of an ERNIE-4.5 text model; defaults are those of the ERNIE classes."""

    architectures: tuple[str, ...]
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    use_bias: bool
    tie_word_embeddings: bool
    moe_num_experts: int  # 0: a dense model
    moe_k: int
    moe_intermediate_size: int
    moe_num_shared_experts: int
    moe_layer_start_index: int
    moe_layer_end_index: int  # the last MoE layer, never -1
    moe_layer_interval: int
    moe_norm_min: float
    num_nextn_predict_layers: int
    max_position_embeddings: int
    dtype: str
    raw: dict[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> ErnieConfig:
        """Read a config.json, the folder that holds one, or an already parsed object."""
        if isinstance(source, Mapping):
            return _parse(_Fields(dict(source), CONFIG_FILE))
        path = Path(source)
        if path.is_dir():
            path = path / CONFIG_FILE
        if not path.is_file():
            raise CcqError(f"{path}: no such file; a checkpoint folder needs its {CONFIG_FILE}")
        content = load_json(path, MAX_CONFIG_BYTES)
        if not isinstance(content, dict):
            raise CcqError(f"{path}: not a JSON object")
        return _parse(_Fields(content, str(path)))

    def is_moe_layer(self, layer: int) -> bool:
        return (
            self.moe_num_experts > 0
            and (layer + 1) % self.moe_layer_interval == 0
            and self.moe_layer_start_index <= layer <= self.moe_layer_end_index
        )

    def moe_layers(self) -> list[int]:
        return [layer for layer in range(self.num_hidden_layers) if self.is_moe_layer(layer)]

    def dense_layers(self) -> list[int]:
        return [layer for layer in range(self.num_hidden_layers) if not self.is_moe_layer(layer)]

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

    def canonical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every tensor of the model, in model order."""
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {}

        def mlp(prefix: str, inner: int) -> None:
            shapes[f"{prefix}.up_gate_proj.weight"] = (hidden, 2 * inner)
            shapes[f"{prefix}.down_proj.weight"] = (inner, hidden)

        shapes["ernie.embed_tokens.weight"] = (self.vocab_size, hidden)
        for layer in range(self.num_hidden_layers):
            prefix = f"ernie.layers.{layer}"
            shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
            qkv = self.q_size + 2 * self.kv_size
            shapes[f"{prefix}.self_attn.qkv_proj.weight"] = (hidden, qkv)
            shapes[f"{prefix}.self_attn.o_proj.weight"] = (self.q_size, hidden)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
            if not self.is_moe_layer(layer):
                mlp(f"{prefix}.mlp", self.intermediate_size)
                continue
            experts = self.moe_num_experts
            shapes[f"{prefix}.mlp.gate.weight"] = (hidden, experts)
            shapes[f"{prefix}.mlp.moe_statics.e_score_correction_bias"] = (1, experts)
            for expert in range(experts):
                mlp(f"{prefix}.mlp.experts.{expert}", self.moe_intermediate_size)
            if self.shared_intermediate_size:
                mlp(f"{prefix}.mlp.shared_experts", self.shared_intermediate_size)
        shapes["ernie.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (hidden, self.vocab_size)
        return shapes


_REQUIRED = object()


class _Fields:
    """Typed access to the fields of one config; a null counts as absent."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def fail(self, key: str, problem: str) -> CcqError:
        return CcqError(f"{self.where}: {key}: {problem}")

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise self.fail(key, "missing")
            return default
        return value

    def integer(self, key: str, low: int, high: int, default: Any = _REQUIRED) -> int:
        value = self.get(key, default)
        if isinstance(value, list) and key.startswith("moe_"):
            raise self.fail(
                key, "a list, as vision-language models have; only text models are supported"
            )
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(key, f"{_show(value)} is not an integer from {low} to {high}")
        return value

    def positive(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.get(key, default)
        # Integers beyond the float range are compared as integers and so never converted.
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e30
        if not good or not math.isfinite(value):
            raise self.fail(key, f"{_show(value)} is not a positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, f"{_show(value)} is neither true nor false")
        return value


def _show(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer too long for Python to print
        text = "the number"
    return text if len(text) <= 60 else text[:57] + "..."


def _parse(fields: _Fields) -> ErnieConfig:
    architectures = _architectures(fields)
    _refuse_unsupported(fields)
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
    return ErnieConfig(
        architectures=architectures,
        model_type=_model_type(fields),
        vocab_size=fields.integer("vocab_size", 1, MAX_WIDTH),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", 1, MAX_WIDTH),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-5),
        rope_theta=_rope_theta(fields),
        use_bias=False,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
        **_moe(fields, layers),
        num_nextn_predict_layers=fields.integer("num_nextn_predict_layers", 0, MAX_LAYERS, 0),
        max_position_embeddings=fields.integer("max_position_embeddings", 1, 1 << 31, 131072),
        dtype=_dtype(fields),
        raw=fields.values,
    )


def _architectures(fields: _Fields) -> tuple[str, ...]:
    supported = ", ".join(ARCHITECTURES)
    names = fields.get("architectures", None)
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise fields.fail("architectures", f"not a list of names; supported are {supported}")
    if names[0] not in ARCHITECTURES:
        raise fields.fail(
            "architectures", f"{_show(names[0])} is not supported; supported are {supported}"
        )
    return tuple(names)


def _model_type(fields: _Fields) -> str:
    value = fields.get("model_type", "ernie4_5")
    if not isinstance(value, str):
        raise fields.fail("model_type", f"{_show(value)} is not a name")
    return value


def _refuse_unsupported(fields: _Fields) -> None:
    """Variants that would load and then compute something else."""
    if fields.boolean("use_bias", False):
        raise fields.fail("use_bias", "true; models with bias terms are not supported")
    activation = fields.get("hidden_act", "silu")
    if activation != "silu":
        raise fields.fail("hidden_act", f"{_show(activation)} is not supported, only 'silu'")
    for key in ("rope_scaling", "rope_parameters"):
        value = fields.get(key, {})
        if not isinstance(value, dict):
            raise fields.fail(key, f"{_show(value)} is not an object")
        kind = value.get("rope_type", value.get("type", "default"))
        if kind not in (None, "default"):
            raise fields.fail(key, f"type {_show(kind)} is not supported, only 'default'")


def _rope_theta(fields: _Fields) -> float:
    # Newer exports keep it one level down.
    nested = fields.get("rope_parameters", {})
    if "rope_theta" in nested and fields.get("rope_theta", None) is None:
        return _Fields(nested, f"{fields.where}: rope_parameters").positive("rope_theta")
    return fields.positive("rope_theta", 500000.0)


def _moe(fields: _Fields, layers: int) -> dict[str, Any]:
    experts = fields.integer("moe_num_experts", 0, MAX_EXPERTS, 0)
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


def _dtype(fields: _Fields) -> str:
    for key in ("dtype", "torch_dtype"):
        value = fields.get(key, "bfloat16")
        if value not in FLOAT_TYPES:
            raise fields.fail(key, f"{_show(value)} is not one of {', '.join(FLOAT_TYPES)}")
    both = fields.get("dtype", None), fields.get("torch_dtype", None)
    if None not in both and both[0] != both[1]:
        raise fields.fail("dtype", f"{both[0]}, but torch_dtype says {both[1]}")
    return both[0] or both[1] or "bfloat16"
