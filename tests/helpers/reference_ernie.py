# SPDX-License-Identifier: Apache-2.0
"""ERNIE-4.5's forward pass in plain float64 NumPy, one sequence and one token at a time.

Written from the architecture's description and kept slow and obvious on purpose: nothing is
batched, cached, reordered or shared with the package.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def logits(config: dict[str, Any], weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """[length, vocab] for one sequence; `weights` by canonical name."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x = w["ernie.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        name = f"ernie.layers.{layer}"
        normed = rms_norm(x, w[f"{name}.input_layernorm.weight"], config["rms_norm_eps"])
        x = x + attention(config, w, f"{name}.self_attn", normed)
        normed = rms_norm(x, w[f"{name}.post_attention_layernorm.weight"], config["rms_norm_eps"])
        if f"{name}.mlp.gate.weight" in w:
            x = x + np.stack([mixture(config, w, f"{name}.mlp", token) for token in normed])
        else:
            x = x + np.stack([mlp(w, f"{name}.mlp", token) for token in normed])
    x = rms_norm(x, w["ernie.norm.weight"], config["rms_norm_eps"])
    if config["tie_word_embeddings"]:
        return x @ w["ernie.embed_tokens.weight"].T
    return x @ w["lm_head.weight"]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return np.stack([row / math.sqrt((row**2).mean() + eps) * weight for row in x])


def attention(config: dict, w: dict, name: str, x: np.ndarray) -> np.ndarray:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config["head_dim"]
    qkv = x @ w[f"{name}.qkv_proj.weight"]
    ends = [heads * dim, (heads + kv_heads) * dim]
    q, k, v = np.split(qkv, ends, axis=1)
    outputs = []
    for head in range(heads):
        shared = head // (heads // kv_heads)
        own, other = slice(head * dim, (head + 1) * dim), slice(shared * dim, (shared + 1) * dim)
        queries = [rotate(row, p, config["rope_theta"]) for p, row in enumerate(q[:, own])]
        keys = [rotate(row, p, config["rope_theta"]) for p, row in enumerate(k[:, other])]
        mixed = []
        for position, query in enumerate(queries):
            scores = np.array([query @ key for key in keys[: position + 1]]) / math.sqrt(dim)
            mixed.append(softmax(scores) @ v[: position + 1, other])
        outputs.append(np.stack(mixed))
    return np.concatenate(outputs, axis=1) @ w[f"{name}.o_proj.weight"]


def rotate(row: np.ndarray, position: int, theta: float) -> np.ndarray:
    """Each pair (2i, 2i+1) is a complex number, turned by position * theta^(-2i/dim)."""
    result = np.empty_like(row)
    for i in range(row.size // 2):
        angle = position * theta ** (-2 * i / row.size)
        turned = complex(row[2 * i], row[2 * i + 1]) * complex(math.cos(angle), math.sin(angle))
        result[2 * i], result[2 * i + 1] = turned.real, turned.imag
    return result


def mixture(config: dict, w: dict, name: str, token: np.ndarray) -> np.ndarray:
    probabilities = softmax(token @ w[f"{name}.gate.weight"])
    preference = probabilities + w[f"{name}.moe_statics.e_score_correction_bias"][0]
    chosen = np.argsort(-preference)[: config["moe_k"]]
    total = max(probabilities[chosen].sum(), config.get("moe_norm_min", 1e-12))
    result = sum(probabilities[e] / total * mlp(w, f"{name}.experts.{e}", token) for e in chosen)
    if config["moe_num_shared_experts"]:
        result = result + mlp(w, f"{name}.shared_experts", token)
    return result


def mlp(w: dict, name: str, token: np.ndarray) -> np.ndarray:
    gate, up = np.split(token @ w[f"{name}.up_gate_proj.weight"], 2)
    return (gate / (1 + np.exp(-gate)) * up) @ w[f"{name}.down_proj.weight"]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()
