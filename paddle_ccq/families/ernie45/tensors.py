# SPDX-License-Identifier: Apache-2.0
"""ERNIE-4.5 text models, dense and mixture-of-experts, as published in two namings.

Canonical names and orientation are those of the -Paddle checkpoints: [in, out], with fused qkv
(all query heads, then all key heads, then all value heads) and fused gate and up. The -PT
checkpoints store [out, in] and the parts separately. Cuts are those of weight_infos in FastDeploy's
models/ernie4_5_moe.py: q, k and v by heads, gate and up each by columns, o_proj and down_proj by
rows, embed_tokens by vocabulary rows and lm_head by vocabulary columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from ..family import Naming
from ..tensor import DOWN, OUT, QKV, UP_GATE, Cut, Role, Source, Stacked, Storage, TensorSpec
from .config import ErnieConfig

PT = Naming(
    "pt",
    "model.",
    "-PT layout (Hugging Face names, [out, in])",
    format_tag="pt",
    dtype_key="torch_dtype",
)
PADDLE = Naming(
    "paddle",
    "ernie.",
    "-Paddle layout (fused names, [in, out])",
    format_tag="np",
    dtype_key="dtype",
    # FastDeploy (config.py, read_model_config) takes newer versions as a sign of torch layout.
    unwanted=("transformers_version",),
    turned_head=True,
)

# Modules outside of layers; under this name the tensors of all checkpoints are known.
EMBEDDING, FINAL_NORM, HEAD = "ernie.embed_tokens.weight", "ernie.norm.weight", "lm_head.weight"
CORRECTION_BIAS = "moe_statics.e_score_correction_bias"
# Where the router's bias lies when a model is saved from classes that keep it inside the gate.
_BIAS_ALIASES = ("gate.moe_statics.e_score_correction_bias", "gate.e_score_correction_bias")
# How the stacks of all experts' matrices are called.
_STACKED = {UP_GATE: "gate_up_proj", DOWN: "down_proj"}
# Matrices that -PT checkpoints store as [out, in].
_TRANSPOSED = {
    *(Role.EXPERT, Role.SHARED_EXPERT, Role.ATTENTION, Role.MLP),
    *(Role.ROUTER, Role.HEAD, Role.OTHER),
}


def tensors(config: ErnieConfig) -> Iterator[TensorSpec]:
    """Every tensor of the model, in model order."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    q, kv, head = config.q_size, config.kv_size, config.head_dim

    def mlp(
        role: Role, place: str, inner: int, experts: int = 0, **where: int
    ) -> Iterator[TensorSpec]:
        shape, cut = (hidden, 2 * inner), Cut(1, (inner, inner))
        fused = {"gate_proj": inner, "up_proj": inner}
        yield _spec(role, place, UP_GATE, shape, cut, fused, experts, **where)
        shape, cut = (inner, hidden), Cut(0, (inner,))
        yield _spec(role, place, DOWN, shape, cut, None, experts, **where)

    def norm(place: str, which: str, **where: int) -> TensorSpec:
        return _spec(Role.NORM, place, which, (hidden,), **where)

    def attention(block: str, layer: int) -> Iterator[TensorSpec]:
        place, out = block + ".self_attn", (q, hidden)
        shape, cut = (hidden, q + 2 * kv), Cut(1, (q, kv, kv), head)
        fused = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        yield norm(block, "input_layernorm", layer=layer)
        yield _spec(Role.ATTENTION, place, QKV, shape, cut, fused, layer=layer)
        yield _spec(Role.ATTENTION, place, OUT, out, Cut(0, (q,), head), layer=layer)
        yield norm(block, "post_attention_layernorm", layer=layer)

    def prediction(number: int) -> Iterator[TensorSpec]:
        """A dense layer behind a projection of a token's embedding and the hidden state."""
        layer, block = config.num_hidden_layers + number, f"ernie.mtp_block.{number}"
        yield norm("ernie", f"mtp_emb_norm.{number}", layer=layer)
        yield norm("ernie", f"mtp_hidden_norm.{number}", layer=layer)
        shape, cut = (2 * hidden, hidden), Cut(1, (hidden,))
        yield _spec(Role.OTHER, "ernie", f"mtp_linear_proj.{number}", shape, cut, layer=layer)
        yield from attention(block, layer)
        yield from mlp(Role.MLP, block + ".mlp", config.intermediate_size, layer=layer)

    shape = (vocabulary, hidden)
    yield _spec(Role.EMBEDDING, "ernie", "embed_tokens", shape, Cut(0, (vocabulary,)))
    for layer in range(config.num_hidden_layers):
        block = "ernie.layers.{layer}"
        yield from attention(block, layer)
        if not config.is_moe_layer(layer):
            yield from mlp(Role.MLP, block + ".mlp", config.intermediate_size, layer=layer)
            continue
        experts = config.moe_num_experts
        yield _spec(Role.ROUTER, block + ".mlp", "gate", (hidden, experts), layer=layer)
        yield _bias(layer, experts)
        for expert in range(experts):
            place, inner = block + ".mlp.experts.{expert}", config.moe_intermediate_size
            yield from mlp(Role.EXPERT, place, inner, experts, layer=layer, expert=expert)
        if config.shared_intermediate_size:
            place, inner = block + ".mlp.shared_experts", config.shared_intermediate_size
            yield from mlp(Role.SHARED_EXPERT, place, inner, layer=layer)
    yield norm("ernie", "norm")
    if not config.tie_word_embeddings:
        shape = (hidden, vocabulary)
        yield _spec(Role.HEAD, "", "lm_head", shape, Cut(1, (vocabulary,)))
    for number in range(config.num_nextn_predict_layers):
        yield from prediction(number)


def _spec(
    role: Role,
    place: str,
    projection: str,
    shape: tuple[int, ...],
    cut: Cut | None = None,
    fused: dict[str, int] | None = None,
    experts: int = 0,
    **where: int,
) -> TensorSpec:
    """The weight of `projection` at a place; `fused` has the -PT parts and their widths.

    `experts`, of a routed expert, is how many there are: transformers' classes since version 5
    stack their matrices.
    """
    template = f"{place}.{projection}.weight".removeprefix(".")
    name = template.format(**where)
    stack = None
    if experts:
        stacked = _on_disk(PT, place.format(**where)).rpartition(".")[0]
        stack = (f"{stacked}.{_STACKED[projection]}", experts, where["expert"])
    sources = {
        PADDLE.name: _whole(PADDLE, name, shape),
        PT.name: _pt_storage(name, projection, shape, fused, stack)
        if role in _TRANSPOSED
        else _whole(PT, name, shape),
    }
    return TensorSpec(name, template, role, shape, projection, cut=cut, sources=sources, **where)


def _bias(layer: int, experts: int) -> TensorSpec:
    template = "ernie.layers.{layer}.mlp." + CORRECTION_BIAS
    name = template.format(layer=layer)
    stem = name.removesuffix(CORRECTION_BIAS)
    aliases = tuple(stem + alias for alias in _BIAS_ALIASES)
    sources = {naming.name: _whole(naming, name, (1, experts), aliases) for naming in (PADDLE, PT)}
    role, projection = Role.CORRECTION_BIAS, "e_score_correction_bias"
    return TensorSpec(name, template, role, (1, experts), projection, layer, sources=sources)


def _on_disk(naming: Naming, name: str) -> str:
    """A canonical name as the naming has it, fused parts staying fused."""
    return naming.prefix + name.removeprefix("ernie.") if name.startswith("ernie.") else name


def _whole(
    naming: Naming, name: str, shape: tuple[int, ...], aliases: tuple[str, ...] = ()
) -> Storage:
    own = _on_disk(naming, name)
    known = tuple(_on_disk(naming, alias) for alias in aliases)
    return Storage((Source(own, shape, None, known),), False, own.removesuffix(".weight"))


def _pt_storage(
    name: str,
    projection: str,
    shape: tuple[int, ...],
    fused: dict[str, int] | None,
    stack: tuple[str, int, int] | None,
) -> Storage:
    """`stack`: the name of a stack that may hold the matrix, its experts, and the place in it."""
    rows, columns = shape
    own = _on_disk(PT, name)
    parts, begin = [], 0
    for part, width in (fused or {projection: columns}).items():
        place = slice(begin, begin + width)
        stacked = None
        if stack is not None:
            stacked = Stacked(stack[0], (stack[1], columns, rows), stack[2], place)
        source = Source(own.replace(projection, part), (width, rows), place, stacked=stacked)
        parts.append(source)
        begin += width
    packed = own.removesuffix(".weight")
    # Hugging Face's word for it.
    here = packed.replace(UP_GATE, "gate_up_proj")
    return Storage(tuple(parts), True, packed, here)


def head_name(config: ErnieConfig) -> str:
    """The matrix that gives the logits; tied, it is the embedding, whose columns they are along."""
    return EMBEDDING if config.tie_word_embeddings else HEAD


def is_mtp(name: str) -> bool:
    """Whether an on-disk name belongs to the multi-token-prediction head."""
    return any(part.startswith("mtp_") or part == "mtp" for part in name.split("."))


def rotary_frequencies(config: ErnieConfig, name: str) -> np.ndarray | None:
    """The values of a stored table of rotary frequencies; None for every other tensor."""
    if not name.endswith("rotary_emb.inv_freq"):
        return None
    half = config.head_dim // 2
    return config.rope_theta ** -(np.arange(half) / half)


def why_unexpected(config: ErnieConfig, name: str) -> str:
    """Why a stored tensor that the model does not have can't be left out."""
    if name.endswith(".bias"):
        return "is a bias; models with bias terms are not supported"
    if name.endswith("inv_freq"):
        return f"are other rotary frequencies than those of rope_theta {config.rope_theta:g}"
    if re.search(r"\.(q|k)_(norm|layernorm)\.", name):
        return "is a norm of queries or keys; such models are not supported"
    layer = re.search(r"\.layers\.(\d+)\.", name)
    expert = re.search(r"\.experts\.(\d+)\.", name)
    says = "is not called for by config.json"
    if layer and int(layer[1]) >= config.num_hidden_layers:
        return f"{says}: num_hidden_layers is {config.num_hidden_layers}"
    if layer and not config.is_moe_layer(int(layer[1])) and re.search(r"expert|gate\.w", name):
        return (
            f"{says}: layer {layer[1]} is no MoE layer (moe_num_experts {config.moe_num_experts},"
            f" moe_layer_start_index {config.moe_layer_start_index}, moe_layer_end_index"
            f" {config.moe_layer_end_index}, moe_layer_interval {config.moe_layer_interval})"
        )
    if expert and int(expert[1]) >= config.moe_num_experts:
        return f"{says}: moe_num_experts is {config.moe_num_experts}"
    if ".shared_experts." in name and not config.moe_num_shared_experts:
        return f"{says}: moe_num_shared_experts is 0"
    return f"{says}; without it this would be another model"
