# SPDX-License-Identifier: Apache-2.0
"""ERNIE-4.5 MoE in PyTorch, small enough to hold whole, for trying choices of encoding on a GPU.

Every expert is computed on every token and masked: wasteful, and fast all the same at the sizes of
the small models this is for. Float32 without TF32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from paddle_ccq.checkpoint.reader import Checkpoint
from paddle_ccq.codec.weight_only import round_wint8

torch.backends.cuda.matmul.allow_tf32 = False
Weights = dict[str, Tensor]
LAYER = "ernie.layers.{}."


class Taps:
    """What passes an MoE layer; subclasses keep it."""

    def inputs(self, layer: int, x: Tensor, routed: Tensor, hidden: Tensor) -> None:
        """x [T, H], routing weights [T, E] (zero where not chosen), up_gate outputs [E, T, 2I]."""

    def outputs(self, layer: int, inner: Tensor, out: Tensor) -> None:
        """Down inputs [E, T, I], weighed sum of the down outputs [T, H]."""


class Ernie:
    """The architecture; weights are passed to it, so that several sets share it."""

    def __init__(self, config: Any, device: str) -> None:
        if config.moe_num_shared_experts or not config.tie_word_embeddings:
            raise SystemExit(
                "this script knows MoE models with tied embeddings and no shared expert"
            )
        self.config = config
        self.device = device

    def load(self, checkpoint: Checkpoint) -> Weights:
        """Canonical name -> tensor; experts of a layer stacked, [E, in, out]."""
        found = {}
        for name in checkpoint.names():
            if ".experts." not in name:
                array = np.ascontiguousarray(checkpoint.read(name), dtype=np.float32)
                found[name] = torch.from_numpy(array).to(self.device)
        for layer in self.config.moe_layers():
            for projection in ("up_gate_proj", "down_proj"):
                name = LAYER.format(layer) + "mlp.experts.{}." + projection + ".weight"
                arrays = [
                    checkpoint.read(name.format(e)) for e in range(self.config.moe_num_experts)
                ]
                stacked = torch.from_numpy(np.stack(arrays).astype(np.float32))
                found[expert_key(layer, projection)] = stacked.to(self.device)
        return found

    def dense_names(self, weights: Weights) -> list[str]:
        """Linear layers that are stored in wint8."""
        return [n for n in weights if n.endswith("_proj.weight") and ".experts." not in n]

    def __call__(self, w: Weights, tokens: Tensor, taps: Taps | None = None) -> Tensor:
        """Log-probabilities [B, T, vocab] of tokens [B, T]."""
        return self.log_p(w, self.hidden(w, tokens, taps))

    def log_p(self, w: Weights, hidden: Tensor) -> Tensor:
        """Log-probabilities of the last hidden states."""
        return torch.log_softmax(hidden @ w["ernie.embed_tokens.weight"].t(), -1)

    def hidden(self, w: Weights, tokens: Tensor, taps: Taps | None = None) -> Tensor:
        """The last hidden states [B, T, H], after the last norm."""
        x = w["ernie.embed_tokens.weight"][tokens]
        for layer in range(self.config.num_hidden_layers):
            name = LAYER.format(layer)
            x = x + self._attention(w, name, self._norm(x, w[name + "input_layernorm.weight"]))
            normed = self._norm(x, w[name + "post_attention_layernorm.weight"])
            x = x + self._mlp(w, layer, normed.flatten(0, 1), taps).view(x.shape)
        return self._norm(x, w["ernie.norm.weight"])

    def _norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps) * gain

    def _attention(self, w: Weights, name: str, x: Tensor) -> Tensor:
        c = self.config
        batch, length, _ = x.shape
        heads, kv, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        qkv = (x @ w[name + "self_attn.qkv_proj.weight"]).view(batch, length, heads + 2 * kv, dim)
        q, k, v = qkv.split([heads, kv, kv], 2)
        q, k = self._turned(q), self._turned(k)
        k, v = (t.repeat_interleave(heads // kv, 2) for t in (k, v))
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        return mixed.transpose(1, 2).flatten(2) @ w[name + "self_attn.o_proj.weight"]

    def _turned(self, x: Tensor) -> Tensor:
        """Neighbouring pairs (2i, 2i + 1) turned by their position."""
        half = x.shape[-1] // 2
        steps = torch.arange(half, device=x.device, dtype=torch.float64) / half
        positions = torch.arange(x.shape[1], device=x.device, dtype=torch.float64)
        angles = positions[:, None] * float(self.config.rope_theta) ** -steps
        cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    def _mlp(self, w: Weights, layer: int, x: Tensor, taps: Taps | None) -> Tensor:
        name = LAYER.format(layer) + "mlp."
        if not self.config.is_moe_layer(layer):
            return swiglu(x @ w[name + "up_gate_proj.weight"]) @ w[name + "down_proj.weight"]
        p = torch.softmax(x @ w[name + "gate.weight"], -1)
        bias = w[name + "moe_statics.e_score_correction_bias"].reshape(1, -1)
        chosen = (p.detach() + bias).topk(self.config.moe_k, -1).indices
        routed = p * torch.zeros_like(p).scatter_(1, chosen, 1.0)
        routed = routed / routed.sum(-1, keepdim=True).clamp_min(self.config.moe_norm_min)
        hidden = torch.matmul(x, w[expert_key(layer, "up_gate_proj")])
        if taps is not None:
            taps.inputs(layer, x, routed, hidden)
        inner = swiglu(hidden)
        down = w[expert_key(layer, "down_proj")]
        out = (inner * routed.t()[..., None]).transpose(0, 1).flatten(1) @ down.flatten(0, 1)
        if taps is not None:
            taps.outputs(layer, inner, out)
        return out


def expert_key(layer: int, projection: str) -> str:
    """Where `load` puts the stacked experts."""
    return LAYER.format(layer) + f"mlp.experts.{projection}"


def swiglu(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate) * up


def in_wint8(model: Ernie, weights: Weights) -> Weights:
    """The same with dense linear layers as wint8 returns them."""
    rounded = dict(weights)
    for name in model.dense_names(weights):
        array = round_wint8(weights[name].cpu().numpy())
        rounded[name] = torch.from_numpy(np.ascontiguousarray(array)).to(model.device)
    return rounded


@torch.no_grad()
def compare(
    model: Ernie, ours: Weights, reference: Weights, windows: Tensor, at_once: int = 8
) -> dict[str, np.ndarray]:
    """Per window: mean KL(reference || ours), nll over the reference's, agreement of the top 1."""
    parts: dict[str, list[Tensor]] = {"kl": [], "nll": [], "top1": []}
    for first in range(0, len(windows), at_once):
        tokens = windows[first : first + at_once]
        a, b = model(reference, tokens)[:, :-1], model(ours, tokens)[:, :-1]
        label = tokens[:, 1:, None]
        parts["kl"].append((a.exp() * (a - b)).sum(-1).mean(1))
        parts["nll"].append((a.gather(-1, label) - b.gather(-1, label)).squeeze(-1).mean(1))
        parts["top1"].append((a.argmax(-1) == b.argmax(-1)).float().mean(1))
    return {name: torch.cat(values).cpu().numpy() for name, values in parts.items()}
