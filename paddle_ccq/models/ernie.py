# SPDX-License-Identifier: Apache-2.0
"""ERNIE-4.5, dense and mixture-of-experts, in float32 for the CPU.

This is our own and not PaddleFormers' model, because that one does not run on a CPU as it is
(fused_rms_norm and the MoE dispatch and combine operators have no CPU kernels, nor has a bfloat16
matmul), brings a 2 GB environment, and keeps experts as plain layers where a serving engine wants
them packed. It is checked in three ways: against an independent float64 NumPy forward (the tests),
against PaddleFormers' logits where that is installed (also a test), and against the perplexity and
task accuracies that the training of two small models reported.

Everything is plain tensors and functions; linear weights are [in, out].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from .weights import WeightSource

# Queries attended at once. A block sees only the keys up to its own end, which saves nearly half
# of the causal attention, and its scores stay small enough for the allocator to reuse.
QUERY_BLOCK = 128
# Added to scores of keys that must not be seen; finite, so that a fully masked (padding) query
# gives numbers and not NaN.
MASKED = -1e9


class Ernie:
    """The whole model. Build it from a checkpoint: `Ernie(open_checkpoint(folder))`.

    Paddle runs an operator on one core. Use several by calling one model from several threads: it
    is not changed by a call, and the operators release the interpreter's lock.
    """

    def __init__(self, weights: WeightSource) -> None:
        config = self.config = weights.config
        self.embed = _tensor(weights, "ernie.embed_tokens.weight")
        self.blocks = [Block(weights, layer) for layer in range(config.num_hidden_layers)]
        self.norm = _tensor(weights, "ernie.norm.weight")
        self.head = None if config.tie_word_embeddings else _tensor(weights, "lm_head.weight")

    @paddle.no_grad()
    def hidden_states(
        self, tokens: Tensor, padding: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Final normalised hidden states [batch, length, hidden] of `tokens` [batch, length].

        `padding` [batch] counts the tokens to ignore on the left of each row. Padding on the
        right needs no mark: attention is causal, so it changes nothing before it.
        With a cache, `tokens` continue what the cache has seen.
        """
        start = cache.length if cache is not None else 0
        rope, spans = positions_of(self.config, start, tokens.shape[1], padding)
        x = F.embedding(tokens, self.embed)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, spans, cache.slot(layer) if cache is not None else None)
        return rms_norm(x, self.norm, self.config.rms_norm_eps)

    @paddle.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab]. Callers choose how many rows at a time: a row is large."""
        if self.head is None:
            return paddle.matmul(hidden, self.embed, transpose_y=True)
        return paddle.matmul(hidden, self.head)


class Block:
    """One decoder layer: attention, then a dense or a mixture-of-experts MLP, each on a norm."""

    def __init__(self, weights: WeightSource, layer: int) -> None:
        config, name = weights.config, f"ernie.layers.{layer}"
        self.eps = config.rms_norm_eps
        self.attention_norm = _tensor(weights, f"{name}.input_layernorm.weight")
        self.attention = Attention(weights, f"{name}.self_attn")
        self.mlp_norm = _tensor(weights, f"{name}.post_attention_layernorm.weight")
        kind = MoE if config.is_moe_layer(layer) else MLP
        self.mlp = kind(weights, f"{name}.mlp")

    def attend(
        self, x: Tensor, rope: Rope, spans: list[Span], slot: Slot | None
    ) -> tuple[Tensor, Tensor]:
        """The layer's first half: its sum so far, and the MLP's inputs [tokens, hidden]."""
        x = x + self.attention(rms_norm(x, self.attention_norm, self.eps), rope, spans, slot)
        normed = rms_norm(x, self.mlp_norm, self.eps)
        return x, normed.reshape([-1, x.shape[-1]])

    def __call__(self, x: Tensor, rope: Rope, spans: list[Span], slot: Slot | None) -> Tensor:
        """x [batch, length, hidden] -> the same shape; `slot` gets the keys and values of x."""
        x, normed = self.attend(x, rope, spans, slot)
        return x + self.mlp(normed).reshape(x.shape)


class Attention:
    """Grouped-query attention with rotary positions."""

    def __init__(self, weights: WeightSource, name: str) -> None:
        config = weights.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        qkv = weights.read(f"{name}.qkv_proj.weight")
        # ERNIE rotates neighbouring pairs (2i, 2i+1) of each query and key head. Stored as all the
        # first members, then all the second ones, then the values, a rotation is four products of
        # whole matrices. Scores do not change: queries and keys are reordered alike.
        self.rotated = (self.heads + self.kv_heads) * self.head_dim
        columns = np.arange(self.rotated).reshape(-1, 2).T.reshape(-1)
        columns = np.concatenate([columns, np.arange(self.rotated, qkv.shape[1])])
        self.columns = columns
        self.qkv = paddle.to_tensor(np.ascontiguousarray(qkv[:, columns]))
        self.out = _tensor(weights, f"{name}.o_proj.weight")

    def __call__(self, x: Tensor, rope: Rope, spans: list[Span], slot: Slot | None) -> Tensor:
        """x [batch, length, hidden] -> the same shape, not yet added to the layer's sum.

        Queries see what is in `slot` as well, to which the keys and values of x are added.
        """
        batch, length, _ = x.shape
        heads, kv_heads, dim = self.heads, self.kv_heads, self.head_dim
        group = heads // kv_heads
        half = self.rotated // 2
        a, b, v = paddle.split(paddle.matmul(x, self.qkv), [half, half, kv_heads * dim], axis=-1)
        cos, sin = rope
        a, b = a * cos - b * sin, a * sin + b * cos
        pairs = [batch, length, heads + kv_heads, dim // 2]
        q, k = paddle.concat([a.reshape(pairs), b.reshape(pairs)], axis=-1).split(
            [heads, kv_heads], axis=2
        )
        # Query heads that share a key head are rows of one matrix product: [..., length, group].
        q = (q * dim**-0.5).reshape([batch, length, kv_heads, group, dim])
        q = q.transpose([0, 2, 1, 3, 4]).contiguous()
        k = k.transpose([0, 2, 1, 3]).contiguous()
        v = v.reshape([batch, length, kv_heads, dim]).transpose([0, 2, 1, 3]).contiguous()
        if slot is not None:
            k, v = slot.extend(k, v)
        # One plain 2-D product per row and key head: Paddle's batched CPU matmul runs these shapes
        # at a third of the speed.
        rows = []
        for row in range(batch):
            mixed = []
            for head in range(kv_heads):
                queries, keys, values = q[row, head], k[row, head], v[row, head]
                parts = []
                for first, last, seen, mask in spans:
                    part = queries[first:last].reshape([-1, dim])
                    scores = paddle.matmul(part, keys[:seen], transpose_y=True)
                    if mask is not None:
                        scores = scores.add_(mask[row % mask.shape[0]])
                    parts.append(paddle.matmul(F.softmax_(scores, axis=-1), values[:seen]))
                mixed.append(paddle.concat(parts).reshape([length, group * dim]))
            rows.append(paddle.concat(mixed, axis=-1))
        return paddle.matmul(paddle.stack(rows), self.out)


class MLP:
    """SwiGLU; also one expert, and the shared experts (which are one wider MLP)."""

    def __init__(self, weights: WeightSource, name: str) -> None:
        self.up_gate = _tensor(weights, f"{name}.up_gate_proj.weight")
        self.down = _tensor(weights, f"{name}.down_proj.weight")

    def inner(self, x: Tensor) -> Tensor:
        """The inputs of the down projection."""
        return F.swiglu(paddle.matmul(x, self.up_gate))

    def __call__(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]."""
        return paddle.matmul(self.inner(x), self.down)


class MoE:
    """Top-k routed experts plus an optional shared one.

    The router's softmax runs over all experts. The correction bias takes part in the choice
    only; the weights are the chosen probabilities without it, made to sum to one.
    """

    def __init__(self, weights: WeightSource, name: str) -> None:
        config = weights.config
        self.top_k, self.norm_min = config.moe_k, config.moe_norm_min
        self.gate = _tensor(weights, f"{name}.gate.weight")
        bias = weights.read(f"{name}.moe_statics.e_score_correction_bias")
        self.bias = paddle.to_tensor(np.asarray(bias, dtype=np.float32).reshape(1, -1))
        self.experts = [
            MLP(weights, f"{name}.experts.{expert}") for expert in range(config.moe_num_experts)
        ]
        self.shared = None
        if config.moe_num_shared_experts:
            self.shared = MLP(weights, f"{name}.shared_experts")

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts [tokens, k] and their weights [tokens, k]."""
        probabilities = F.softmax(paddle.matmul(x, self.gate), axis=-1)
        _, chosen = paddle.topk(probabilities + self.bias, self.top_k, axis=-1)
        weights = paddle.take_along_axis(probabilities, chosen, axis=-1)
        return chosen, weights / weights.sum(axis=-1, keepdim=True).clip(min=self.norm_min)

    def __call__(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden], routed and shared experts together."""
        chosen, weights = self.route(x)
        # Sort the (token, choice) pairs by expert, so that each expert is one matrix product.
        flat = chosen.numpy().reshape(-1)
        order = np.argsort(flat, kind="stable")
        back = np.empty_like(order)
        back[order] = np.arange(order.size)
        counts = np.bincount(flat, minlength=len(self.experts))
        gathered = paddle.gather(x, paddle.to_tensor(order // self.top_k))
        outputs, start = [], 0
        for expert, count in zip(self.experts, counts.tolist(), strict=True):
            if count:
                outputs.append(expert(gathered[start : start + count]))
                start += count
        # Summed in the order of the choices, not of the experts: a token's result does not
        # depend on which other tokens are in the batch.
        y = paddle.gather(paddle.concat(outputs), paddle.to_tensor(back))
        y = y.reshape([-1, self.top_k, x.shape[-1]])
        y = paddle.matmul(weights.unsqueeze(1), y).squeeze(1)
        return y if self.shared is None else y + self.shared(x)


class Slot:
    """Keys and values [batch, kv heads, positions, head dim] that one layer has seen."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values up to and with these, which are kept for the next call."""
        self.k = k if self.k is None else paddle.concat([self.k, k], axis=2)
        self.v = v if self.v is None else paddle.concat([self.v, v], axis=2)
        return self.k, self.v


class Cache:
    """The slots of all layers."""

    def __init__(self, layers: int) -> None:
        self.slots = [Slot() for _ in range(layers)]

    @property
    def length(self) -> int:
        """Positions that have been seen, padding included."""
        k = self.slots[0].k
        return 0 if k is None else k.shape[2]

    def slot(self, layer: int) -> Slot:
        """What a layer's attention is called with."""
        return self.slots[layer]

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch, or repeat them."""
        for slot in self.slots:
            slot.k = paddle.index_select(slot.k, rows, axis=0)
            slot.v = paddle.index_select(slot.v, rows, axis=0)


# Queries first..last see the first `seen` keys, under an additive mask (None: see all of them).
Span = tuple[int, int, int, "Tensor | None"]
Rope = tuple[Tensor, Tensor]  # cosines and sines [rows or 1, length, rotated columns / 2]


def positions_of(
    config: Any, start: int, length: int, padding: Tensor | None = None
) -> tuple[Rope, list[Span]]:
    """What attention needs to know of `length` positions from `start` on."""
    positions = paddle.arange(start, start + length).unsqueeze(0)
    if padding is not None:
        positions = (positions - padding.unsqueeze(1)).clip(min=0)
    half = config.head_dim // 2
    steps = paddle.arange(half, dtype="float64") / half
    angles = positions.astype("float64").unsqueeze(-1) * float(config.rope_theta) ** -steps
    # One copy for each head, in the order of Attention's columns: no broadcasting per layer.
    copies = [1, 1, config.num_attention_heads + config.num_key_value_heads]
    rope = tuple(f(angles).astype("float32").tile(copies) for f in (paddle.cos, paddle.sin))
    group = config.num_attention_heads // config.num_key_value_heads
    return rope, _query_spans(start, length, group, padding)


def _query_spans(start: int, length: int, group: int, padding: Tensor | None) -> list[Span]:
    """Blocks of queries with their masks [rows or 1, queries * group, seen]."""
    spans: list[Span] = []
    for first in range(0, length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, length)
        seen = start + last
        mask = None
        if length > 1 or padding is not None:
            keys = paddle.arange(seen)
            queries = paddle.arange(start + first, seen).repeat_interleave(group)
            hidden = (keys > queries.unsqueeze(1)).unsqueeze(0)
            if padding is not None:
                hidden = paddle.logical_or(hidden, (keys < padding.unsqueeze(1)).unsqueeze(1))
            mask = hidden.astype("float32") * MASKED
        spans.append((first, last, seen, mask))
    return spans


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""
    scale = paddle.rsqrt(paddle.square(x).mean(axis=-1, keepdim=True) + eps)
    return x * scale * weight


def _tensor(weights: WeightSource, name: str) -> Tensor:
    return paddle.to_tensor(np.ascontiguousarray(weights.read(name), dtype=np.float32))
