# SPDX-License-Identifier: Apache-2.0
"""The tensors that layers of most families are put together from, by their names on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .moe_config import MoeConfig
from .tensor import Role


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
    """The weight of a norm, [size]."""
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
    """The router's matrix, [experts, hidden]."""
    shape = (config.moe_num_experts, config.hidden_size)
    return Part(f"{place}.weight", shape, Role.ROUTER, alias=alias)


def correction_bias(config: MoeConfig, name: str, alias: str = "") -> Part:
    """What is added to routing scores when experts are chosen, [experts]."""
    return Part(name, (config.moe_num_experts,), Role.CORRECTION_BIAS, alias=alias)


def layer_norms(config: MoeConfig) -> Iterator[Part]:
    """The norms before attention and before the MLP."""
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
