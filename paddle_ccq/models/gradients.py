# SPDX-License-Identifier: Apache-2.0
"""The model's forward pass with what its backward pass needs, and that backward pass.

The backward pass is written out because Paddle's automatic differentiation crashes when two threads
use it at once. Here each thread works on one window, as everywhere in this package, and no product
is computed that no gradient needs. The tests compare it with finite differences and with Paddle's
own gradients.

The gradient of a matrix' column factors needs no gradient of the matrix: with y = x W and each
column n of W multiplied by exp(f_n), dL/df_n is the sum over tokens of y_n dL/dy_n.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from .ernie import MLP, Attention, Block, Ernie, MoE, Rope, Span, positions_of

# Logits computed at once, as in evaluation.
CHUNK_LOGITS = 1 << 22

# Which gradient of a tensor is wanted: that of its column factors, or that of the tensor itself.
# A tensor that is not in the dictionary gets none.
FACTORS, WHOLE = "factors", "whole"
Wanted = dict[str, str]


# The gradient with respect to an operation's output -> the gradient with respect to its input.
Backward = Callable[[Tensor], Tensor]


class LayerPass:
    """Forward and backward pass of one window through layers.

    Every forward method returns the output and its backward function. That function adds the
    wanted gradients of the parameters to `gradients`.
    """

    def __init__(self, config: Any, wanted: Wanted) -> None:
        self.config = config
        self.wanted = wanted
        self.gradients: dict[str, np.ndarray] = {}

    def _add(self, name: str, gradient: Tensor) -> None:
        value = gradient.numpy()
        known = self.gradients.get(name)
        self.gradients[name] = value if known is None else known + value

    def _product(self, name: str, x: Tensor, weight: Tensor) -> tuple[Tensor, Backward]:
        """The product x W, and its backward function."""
        y = paddle.matmul(x, weight)
        wanted = self.wanted.get(name)

        def backward(gradient: Tensor) -> Tensor:
            if wanted == FACTORS:
                self._add(name, (gradient * y).sum(axis=0))
            elif wanted == WHOLE:
                self._add(name, paddle.matmul(x, gradient, transpose_x=True))
            return paddle.matmul(gradient, weight, transpose_y=True)

        return y, backward

    def norm(self, name: str, x: Tensor, gain: Tensor) -> tuple[Tensor, Backward]:
        """RMSNorm of x [tokens, hidden], and its backward function."""
        scale = paddle.rsqrt(
            paddle.square(x).mean(axis=-1, keepdim=True) + self.config.rms_norm_eps
        )
        normed = x * scale

        def backward(gradient: Tensor) -> Tensor:
            if name in self.wanted:
                self._add(name, (gradient * normed).sum(axis=0))
            gradient = gradient * gain
            along = (gradient * normed).mean(axis=-1, keepdim=True)
            return (gradient - normed * along) * scale

        return normed * gain, backward

    def block(
        self, name: str, block: Block, x: Tensor, rope: Rope, spans: list[Span]
    ) -> tuple[Tensor, Backward]:
        """A decoder layer on x [tokens, hidden] of one window, and its backward function."""
        normed, backward_norm = self.norm(f"{name}.input_layernorm.weight", x, block.attention_norm)
        mixed, backward_attention = self._attention(
            f"{name}.self_attn", block.attention, normed, rope, spans
        )
        middle = x + mixed
        normed, backward_mlp_norm = self.norm(
            f"{name}.post_attention_layernorm.weight", middle, block.mlp_norm
        )
        layer = self._moe if isinstance(block.mlp, MoE) else self._mlp
        y, backward_mlp = layer(f"{name}.mlp", block.mlp, normed)

        def backward(gradient: Tensor) -> Tensor:
            gradient = gradient + backward_mlp_norm(backward_mlp(gradient))
            return gradient + backward_norm(backward_attention(gradient))

        return middle + y, backward

    def _attention(
        self, name: str, attention: Attention, x: Tensor, rope: Rope, spans: list[Span]
    ) -> tuple[Tensor, Backward]:
        heads, kv_heads, dim = attention.heads, attention.kv_heads, attention.head_dim
        group, length, half = heads // kv_heads, x.shape[0], attention.rotated // 2
        qkv, backward_qkv = self._product(f"{name}.qkv_proj.weight", x, attention.qkv)
        a, b, v = paddle.split(qkv, [half, half, kv_heads * dim], axis=-1)
        cos, sin = rope[0][0], rope[1][0]
        a, b = a * cos - b * sin, a * sin + b * cos
        pairs = [length, heads + kv_heads, dim // 2]
        turned = paddle.concat([a.reshape(pairs), b.reshape(pairs)], axis=-1)
        q, k = turned.split([heads, kv_heads], axis=1)
        q = (q * dim**-0.5).reshape([length, kv_heads, group, dim])
        saved, mixed = [], []
        for head in range(kv_heads):
            queries, keys = q[:, head].reshape([-1, dim]), k[:, head].contiguous()
            values = v[:, head * dim : (head + 1) * dim].contiguous()
            probabilities, parts = [], []
            for first, last, seen, mask in spans:
                part = queries[first * group : last * group]
                scores = paddle.matmul(part, keys[:seen], transpose_y=True)
                if mask is not None:
                    scores = scores.add_(mask[0])
                scores = F.softmax_(scores, axis=-1)
                probabilities.append(scores)
                parts.append(paddle.matmul(scores, values[:seen]))
            saved.append((queries, keys, values, probabilities, paddle.concat(parts)))
            mixed.append(saved[-1][4].reshape([length, group * dim]))
        out, backward_out = self._product(
            f"{name}.o_proj.weight", paddle.concat(mixed, axis=-1), attention.out
        )

        def backward(gradient: Tensor) -> Tensor:
            gradient = backward_out(gradient)
            dq, dk, dv = [], [], []
            for head, (queries, keys, values, probabilities, result) in enumerate(saved):
                width = group * dim
                d_out = gradient[:, head * width : (head + 1) * width].reshape([-1, dim])
                along = (d_out * result).sum(axis=-1, keepdim=True)
                d_keys, d_values = paddle.zeros_like(keys), paddle.zeros_like(values)
                d_queries = []
                for (first, last, seen, _), p in zip(spans, probabilities, strict=True):
                    rows = slice(first * group, last * group)
                    d_values[:seen] += paddle.matmul(p, d_out[rows], transpose_x=True)
                    d_scores = paddle.matmul(d_out[rows], values[:seen], transpose_y=True)
                    d_scores = d_scores.subtract_(along[rows]).multiply_(p)
                    d_queries.append(paddle.matmul(d_scores, keys[:seen]))
                    d_keys[:seen] += paddle.matmul(d_scores, queries[rows], transpose_x=True)
                dq.append(paddle.concat(d_queries).reshape([length, group, dim]) * dim**-0.5)
                dk.append(d_keys.unsqueeze(1))
                dv.append(d_values)
            d_turned = paddle.concat([*dq, *dk], axis=1)
            da, db = (
                part.reshape([length, half])
                for part in d_turned.split([dim // 2, dim // 2], axis=-1)
            )
            da, db = da * cos + db * sin, db * cos - da * sin
            return backward_qkv(paddle.concat([da, db, *dv], axis=-1))

        return out, backward

    def _mlp(self, name: str, mlp: MLP, x: Tensor) -> tuple[Tensor, Backward]:
        h, backward_up = self._product(f"{name}.up_gate_proj.weight", x, mlp.up_gate)
        y, backward_down = self._product(f"{name}.down_proj.weight", F.swiglu(h), mlp.down)

        def backward(gradient: Tensor) -> Tensor:
            gate, up = paddle.split(h, 2, axis=-1)
            gradient = backward_down(gradient)
            open_ = F.sigmoid(gate)
            passed = gate * open_
            d_gate = gradient * up * (open_ + passed * (1 - open_))
            return backward_up(paddle.concat([d_gate, gradient * passed], axis=-1))

        return y, backward

    def routed(self, name: str, chosen: Tensor) -> None:
        """Called with the experts [tokens, k] that an MoE layer chose; subclasses override it."""

    def _moe(self, name: str, moe: MoE, x: Tensor) -> tuple[Tensor, Backward]:
        chosen, weights = moe.route(x)
        self.routed(name, chosen)
        flat = chosen.numpy().reshape(-1)
        order = np.argsort(flat, kind="stable")
        inverse = np.empty_like(order)
        inverse[order] = np.arange(order.size)
        tokens, inverse = paddle.to_tensor(order // moe.top_k), paddle.to_tensor(inverse)
        counts = np.bincount(flat, minlength=len(moe.experts)).tolist()
        gathered = paddle.gather(x, tokens)
        outputs, backwards, start = [], [], 0
        for index, count in enumerate(counts):
            if count:
                rows = slice(start, start + count)
                expert = moe.experts[index]
                y, expert_backward = self._mlp(f"{name}.experts.{index}", expert, gathered[rows])
                outputs.append(y)
                backwards.append((rows, expert_backward))
                start += count
        pairs = [x.shape[0], moe.top_k, x.shape[1]]
        outputs = paddle.gather(paddle.concat(outputs), inverse).reshape(pairs)
        y = paddle.matmul(weights.unsqueeze(1), outputs).squeeze(1)
        backward_shared = None
        if moe.shared is not None:
            shared, backward_shared = self._mlp(f"{name}.shared_experts", moe.shared, x)
            y = y + shared

        def backward(gradient: Tensor) -> Tensor:
            d_weights = paddle.matmul(outputs, gradient.unsqueeze(2)).squeeze(2)
            by_expert = paddle.gather(gradient, tokens)
            factor = paddle.gather(weights.reshape([-1, 1]), paddle.to_tensor(order))
            by_expert = by_expert * factor
            d_gathered = paddle.concat(
                [expert_backward(by_expert[rows]) for rows, expert_backward in backwards]
            )
            d_x = paddle.gather(d_gathered, inverse).reshape(pairs).sum(axis=1)
            # The routing weights are the softmax over the chosen experts alone: the probability of
            # the other experts cancels when the chosen ones are made to sum to one.
            d_chosen = weights * (d_weights - (d_weights * weights).sum(axis=-1, keepdim=True))
            d_logits = paddle.put_along_axis(
                paddle.zeros([x.shape[0], len(moe.experts)]), chosen, d_chosen, axis=1
            )
            if f"{name}.gate.weight" in self.wanted:
                self._add(f"{name}.gate.weight", paddle.matmul(x, d_logits, transpose_x=True))
            d_x = d_x + paddle.matmul(d_logits, moe.gate, transpose_y=True)
            return d_x if backward_shared is None else d_x + backward_shared(gradient)

        return y, backward


class Pass(LayerPass):
    """Forward and backward pass of one window through the whole model."""

    def __init__(self, model: Ernie, wanted: Wanted) -> None:
        super().__init__(model.config, wanted)
        self.model = model

    @paddle.no_grad()
    def run(self, window: np.ndarray, teacher: np.ndarray) -> float:
        """Sum over the window's tokens of KL(teacher || model); gradients of the sum.

        `teacher` holds the float model's final hidden states of the window [length, hidden].
        """
        model = self.model
        rope, spans = positions_of(model.config, 0, window.size)
        x = F.embedding(paddle.to_tensor(window), model.embed)
        backwards = []
        for layer, block in enumerate(model.blocks):
            x, backward = self.block(f"ernie.layers.{layer}", block, x, rope, spans)
            backwards.append(backward)
        hidden, backward_norm = self.norm("ernie.norm.weight", x, model.norm)
        loss, gradient = head_loss(model, hidden, teacher)
        gradient = backward_norm(gradient)
        while backwards:
            gradient = backwards.pop()(gradient)
        return loss


@paddle.no_grad()
def head_loss(model: Ernie, hidden: Tensor, teacher: np.ndarray) -> tuple[float, Tensor]:
    """Sum of KL(teacher || model) over tokens, and its gradient with respect to `hidden`."""
    rows = max(1, CHUNK_LOGITS // model.config.vocab_size)
    loss, gradients = 0.0, []
    for first in range(0, hidden.shape[0], rows):
        ours = model.logits(hidden[first : first + rows])
        theirs = model.logits(paddle.to_tensor(teacher[first : first + rows]))
        q, p = F.softmax(ours, axis=-1), F.softmax(theirs, axis=-1)
        # The log of the normalizer is the largest logit less the log of its probability. Both
        # maxima are of the same entry.
        normalizers = [
            (z.max(axis=-1) - paddle.log(s.max(axis=-1))).astype("float64").numpy()
            for z, s in ((ours, q), (theirs, p))
        ]
        gap = (theirs.subtract_(ours).multiply_(p)).sum(axis=-1).astype("float64").numpy()
        loss += float((gap - normalizers[1] + normalizers[0]).sum())
        gradient = q.subtract_(p)
        if model.head is None:
            gradients.append(paddle.matmul(gradient, model.embed))
        else:
            gradients.append(paddle.matmul(gradient, model.head, transpose_y=True))
    return loss, paddle.concat(gradients)


@paddle.no_grad()
def loss_of(model: Ernie, window: np.ndarray, teacher: np.ndarray) -> float:
    """Sum of KL(teacher || model) over a window's tokens, without gradients."""
    hidden = model.hidden_states(paddle.to_tensor(window).unsqueeze(0))[0]
    return head_loss(model, hidden, teacher)[0]
