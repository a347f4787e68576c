# SPDX-License-Identifier: Apache-2.0
"""ERNIE-4.5 over a batch of sequences at different positions, on packed experts.

The arithmetic is that of models/ernie.py in another order of operators: rows of all sequences,
prompt pieces and single tokens alike, pass the linear layers together; attention is done for each
sequence where its keys and values lie. Every operator treats a row the same whatever else is in the
step, so a token's logits are the same bits alone, in any batch, and however its prompt was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..checkpoint.reader import Checkpoint
from ..errors import CcqError
from ..models.weights import ExactWeights
from ..ops.attention import attend
from ..ops.gpu_memory import Device
from .kv_cache import KVCache, Region
from .weights import MLP, Embedding, Experts, Linear

# Rows of logits at a time when a prompt is scored: 26 MB at a vocabulary of 103,424.
SCORED_ROWS = 64


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence to be computed now, the first at position `start`.

    `score` is called with the logits [rows, vocab] of all tokens in order, some at a time, but the
    last one's where `wants_logits` returns them.
    """

    tokens: Sequence[int]
    start: int
    region: Region
    wants_logits: bool = True  # of its last token
    score: Callable[[np.ndarray], None] | None = None


class EngineModel:
    """The weights of a checkpoint and the forward step.

    With a device, routed experts that can be are in its memory and run there.

    Attributes:
        expert_bytes, gpu_bytes, dense_bytes: memory held for routed experts, for those on the GPU,
            and for everything else.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        max_length: int | None = None,
        threads: int | None = None,
        device: Device | None = None,
    ) -> None:
        config = self.config = checkpoint.config
        weights = ExactWeights(checkpoint)
        self.max_length = max_length or config.max_position_embeddings
        self.embed = Embedding(weights, threads)
        layers = range(config.num_hidden_layers)
        self.layers = [Layer(weights, i, threads, device) for i in layers]
        self.norm = weights.read("ernie.norm.weight")
        self.head = (
            None if config.tie_word_embeddings else Linear(weights, "lm_head.weight", threads)
        )
        self.expert_bytes = sum(layer.expert_bytes for layer in self.layers)
        self.gpu_bytes = sum(layer.gpu_bytes for layer in self.layers)
        self.dense_bytes = self.embed.nbytes + sum(layer.dense_bytes for layer in self.layers)
        self.dense_bytes += 0 if self.head is None else self.head.nbytes
        half = config.head_dim // 2
        # float64 angles, as models/ernie.py: float32 would be off by 1e-3 at position 10,000.
        angles = np.arange(self.max_length)[:, None] * float(config.rope_theta) ** -(
            np.arange(half) / half
        )
        self.cos = np.cos(angles).astype(np.float32)
        self.sin = np.sin(angles).astype(np.float32)

    def new_cache(self, tokens: int) -> KVCache:
        """A KV cache of at least so many token places for all layers of the model.

        Raises:
            CcqError: if the system does not give so much address space.
        """
        config = self.config
        shape = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        try:
            return KVCache(*shape, tokens)
        except (OSError, OverflowError, ValueError, MemoryError):
            raise CcqError(
                f"--kv-cache-tokens {tokens}: the system does not give so much memory; take fewer"
            ) from None

    def forward(self, pieces: Sequence[Piece], cache: KVCache) -> np.ndarray:
        """Logits float32 [pieces that want them, vocab]; the cache takes up all tokens."""
        tokens = np.concatenate([np.asarray(p.tokens, np.int64) for p in pieces])
        positions = np.concatenate([np.arange(p.start, p.start + len(p.tokens)) for p in pieces])
        rope = self.cos[positions], self.sin[positions]
        places = np.array([(len(p.tokens), p.start, p.region.start) for p in pieces], np.int64)
        x = self.embed(tokens)
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, places, cache.keys[index], cache.values[index])
        ends = np.cumsum([len(p.tokens) for p in pieces]) - 1
        for end, piece in zip(ends, pieces, strict=True):
            if piece.score is not None:
                stop = end + 1 - piece.wants_logits
                for first in range(end + 1 - len(piece.tokens), stop, SCORED_ROWS):
                    piece.score(self._logits(x[first : min(first + SCORED_ROWS, stop)]))
        wanted = [end for end, piece in zip(ends, pieces, strict=True) if piece.wants_logits]
        return self._logits(x[wanted])

    def _logits(self, x: np.ndarray) -> np.ndarray:
        x = rms_norm(x, self.norm, self.config.rms_norm_eps)
        return self.embed.logits(x) if self.head is None else self.head(x)


class Layer:
    """One decoder layer: attention, then a dense or a mixture-of-experts MLP, each on a norm."""

    def __init__(
        self,
        weights: ExactWeights,
        layer: int,
        threads: int | None,
        device: Device | None = None,
    ) -> None:
        config, name = weights.config, f"ernie.layers.{layer}"
        self.config, self.threads = config, threads
        self.attention_norm = weights.read(f"{name}.input_layernorm.weight")
        self.mlp_norm = weights.read(f"{name}.post_attention_layernorm.weight")
        self.qkv = Linear(weights, f"{name}.self_attn.qkv_proj.weight", threads)
        self.out = Linear(weights, f"{name}.self_attn.o_proj.weight", threads)
        self.expert_bytes = self.gpu_bytes = 0
        self.dense_bytes = self.qkv.nbytes + self.out.nbytes
        self.experts = self.mlp = None
        if config.is_moe_layer(layer):
            self.gate = Linear(weights, f"{name}.mlp.gate.weight", threads)
            self.bias = weights.read(f"{name}.mlp.moe_statics.e_score_correction_bias")
            self.experts = Experts(weights, f"{name}.mlp.experts", threads, device)
            if self.experts.gpu is None:
                self.expert_bytes = self.experts.nbytes
            else:
                self.gpu_bytes = self.experts.nbytes
            self.dense_bytes += self.gate.nbytes
            if config.moe_num_shared_experts:
                self.mlp = MLP(weights, f"{name}.mlp.shared_experts", threads)
        else:
            self.mlp = MLP(weights, f"{name}.mlp", threads)
        self.dense_bytes += 0 if self.mlp is None else self.mlp.nbytes

    def __call__(
        self,
        x: np.ndarray,
        rope: tuple[np.ndarray, np.ndarray],
        places: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
    ) -> np.ndarray:
        """x float32 [tokens, hidden] of all pieces -> the same shape.

        Args:
            rope, places, keys, values: see ops.attention.attend(); this layer's part of the cache.
        """
        config = self.config
        qkv = self.qkv(rms_norm(x, self.attention_norm, config.rms_norm_eps))
        heads = config.num_attention_heads
        x = x + self.out(attend(qkv, rope, places, keys, values, heads, self.threads))
        normed = rms_norm(x, self.mlp_norm, config.rms_norm_eps)
        if self.experts is None:
            return x + self.mlp(normed)
        y = self.experts(normed, *self._route(normed))
        if self.mlp is not None:
            y = y + self.mlp(normed)
        return x + y

    def _route(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Chosen experts and routing weights [tokens, k]; the bias enters the choice only."""
        config = self.config
        scores = softmax(self.gate(x))
        order = np.argsort(-(scores + self.bias.reshape(1, -1)), axis=-1, kind="stable")
        chosen = np.ascontiguousarray(order[:, : config.moe_k])
        routing_weights = scores[np.arange(len(x))[:, None], chosen]
        routing_weights /= np.maximum(
            routing_weights.sum(axis=-1, keepdims=True), np.float32(config.moe_norm_min)
        )
        return chosen, routing_weights


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis; the largest entry is taken off first, so that nothing overflows."""
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    x /= x.sum(axis=-1, keepdims=True)
    return x


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""
    # The sum itself: np.mean takes longer to begin than a row of a small model to add up.
    sums = np.add.reduce(x * x, axis=-1, keepdims=True)
    return x * (1 / np.sqrt(sums / np.float32(x.shape[-1]) + np.float32(eps))) * weight
