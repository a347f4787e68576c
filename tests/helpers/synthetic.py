# SPDX-License-Identifier: Apache-2.0
"""Small random ERNIE-4.5 checkpoints in the -PT and -Paddle layouts, for the tests.

The names and orientations are spelled out here on their own, so that the package's mapping is
checked against a second statement of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from paddle_ccq.codec import formats

# Tensors of several types as a header lists them, a scalar and an empty one among them.
TENSOR_SPECS = [
    ("a", "BF16", (3, 4)),
    ("b", "F32", ()),
    ("empty", "U8", (0, 4)),
    ("c", "I16", (5,)),
    ("d", "U8", (2, 3)),
]

DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
DTYPE_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """A MoE config with 1 dense and 2 MoE layers; every input dimension is a multiple of 128.

    `moe_num_experts=0` gives a dense model (as 0.3B), `num_nextn_predict_layers=1` adds MTP
    tensors, `tie_word_embeddings=False` adds an lm_head.
    """
    config: dict[str, Any] = {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_bias": False,
        "tie_word_embeddings": True,
        "max_position_embeddings": 256,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 128,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_use_aux_free": True,
        "num_nextn_predict_layers": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if overrides.get("moe_num_experts") == 0:
        config["architectures"] = ["Ernie4_5_ForCausalLM"]
        config["model_type"] = "ernie4_5"
    config.update(overrides)
    return config


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights by canonical name, [in, out] with q/k/v and gate/up fused.

    Scaled so that activations stay of order one through the model.
    """
    rng = np.random.default_rng(seed)
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    q_size = config["num_attention_heads"] * head_dim
    kv_size = config["num_key_value_heads"] * head_dim
    weights: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        values = rng.standard_normal((rows, columns)) * gain / np.sqrt(rows)
        weights[name] = values.astype(np.float32)

    def norm(name: str) -> None:
        weights[name] = (1 + 0.1 * rng.standard_normal(hidden)).astype(np.float32)

    def mlp(prefix: str, inner: int) -> None:
        matrix(f"{prefix}.up_gate_proj.weight", hidden, 2 * inner)
        matrix(f"{prefix}.down_proj.weight", inner, hidden)

    weights["ernie.embed_tokens.weight"] = rng.standard_normal(
        (config["vocab_size"], hidden)
    ).astype(np.float32)
    experts = config["moe_num_experts"]
    last = config["moe_layer_end_index"]
    last = config["num_hidden_layers"] - 1 if last == -1 else last
    for layer in range(config["num_hidden_layers"]):
        prefix = f"ernie.layers.{layer}"
        norm(f"{prefix}.input_layernorm.weight")
        matrix(f"{prefix}.self_attn.qkv_proj.weight", hidden, q_size + 2 * kv_size)
        matrix(f"{prefix}.self_attn.o_proj.weight", q_size, hidden)
        norm(f"{prefix}.post_attention_layernorm.weight")
        on_interval = (layer + 1) % config["moe_layer_interval"] == 0
        if not (experts and on_interval and config["moe_layer_start_index"] <= layer <= last):
            mlp(f"{prefix}.mlp", config["intermediate_size"])
            continue
        matrix(f"{prefix}.mlp.gate.weight", hidden, experts)
        bias = 0.1 * rng.standard_normal((1, experts))
        weights[f"{prefix}.mlp.moe_statics.e_score_correction_bias"] = bias.astype(np.float32)
        for expert in range(experts):
            mlp(f"{prefix}.mlp.experts.{expert}", config["moe_intermediate_size"])
        shared = config["moe_num_shared_experts"] * config["moe_intermediate_size"]
        if shared:
            mlp(f"{prefix}.mlp.shared_experts", shared)
    norm("ernie.norm.weight")
    if not config["tie_word_embeddings"]:
        matrix("lm_head.weight", hidden, config["vocab_size"])
    for number in range(config["num_nextn_predict_layers"]):
        norm(f"ernie.mtp_emb_norm.{number}.weight")
        norm(f"ernie.mtp_hidden_norm.{number}.weight")
        matrix(f"ernie.mtp_linear_proj.{number}.weight", 2 * hidden, hidden)
        prefix = f"ernie.mtp_block.{number}"
        norm(f"{prefix}.input_layernorm.weight")
        matrix(f"{prefix}.self_attn.qkv_proj.weight", hidden, q_size + 2 * kv_size)
        matrix(f"{prefix}.self_attn.o_proj.weight", q_size, hidden)
        norm(f"{prefix}.post_attention_layernorm.weight")
        mlp(f"{prefix}.mlp", config["intermediate_size"])
    return weights


_TURNED = ("_proj.weight", "mlp.gate.weight", "mtp_linear_proj.0.weight")


def stored_weights(
    config: dict[str, Any], weights: dict[str, np.ndarray], layout: str, dtype: str
) -> dict[str, np.ndarray]:
    """The tensors as they lie on disk; router weights and biases stay float32."""
    stored: dict[str, np.ndarray] = {}
    inner_q = config["num_attention_heads"] * config["head_dim"]
    inner_kv = config["num_key_value_heads"] * config["head_dim"]
    for name, value in weights.items():
        keep = name.endswith(("mlp.gate.weight", "e_score_correction_bias"))
        value = value.astype(np.float32 if keep else DTYPES[dtype])
        if layout == "paddle":
            stored[name] = value
            continue
        name = "model." + name.removeprefix("ernie.") if name != "lm_head.weight" else name
        if name.endswith("qkv_proj.weight"):
            cuts = np.split(value, [inner_q, inner_q + inner_kv], axis=1)
            for letter, part in zip("qkv", cuts, strict=True):
                stored[name.replace("qkv_proj", f"{letter}_proj")] = part.T
        elif name.endswith("up_gate_proj.weight"):
            gate, up = np.split(value, 2, axis=1)
            stored[name.replace("up_gate_proj", "gate_proj")] = gate.T
            stored[name.replace("up_gate_proj", "up_proj")] = up.T
        elif name.endswith(_TURNED) or name == "lm_head.weight":
            stored[name] = value.T
        else:
            stored[name] = value
    return {name: np.ascontiguousarray(value) for name, value in stored.items()}


def write_checkpoint(
    folder: str | Path,
    config: dict[str, Any] | None = None,
    layout: str = "pt",
    dtype: str = "bf16",
    shards: int = 1,
    seed: int = 0,
    extra: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Write a checkpoint folder; returns the weights by canonical name, rounded as on disk.

    `extra` adds tensors under their on-disk names, replacing any of the same name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(config or tiny_config())
    weights = random_weights(config, seed)
    tensors = {**stored_weights(config, weights, layout, dtype), **(extra or {})}
    write_tensors(folder, tensors, shards)
    config["torch_dtype" if layout == "pt" else "dtype"] = DTYPE_NAMES[dtype]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder)
    rounded = stored_weights(config, weights, "paddle", dtype)
    return {name: rounded[name].astype(np.float32) for name in weights}


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """One `model.safetensors`, or `shards` files with an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    names = list(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        chosen = names[shard::shards]
        save_file({n: tensors[n] for n in chosen}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(chosen, file))
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: <unk>, <s>, </s>, then one token for each of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # Byte-level BPE stands for the other bytes by the code points from 256 on, in order.
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    special = ["<unk>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate(special)}
    vocab.update({symbols[byte]: len(special) + byte for byte in range(256)})
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": True, **flags} for i, token in enumerate(special)
        ],
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "decoder": {**byte_level, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    )


def zero_tensors(format: str, k: int, n: int) -> formats.Tensors:
    """One stored matrix of the format, all of whose bytes are zero."""
    specs = formats.tensor_specs(format, k, n)
    return {s: np.zeros(shape, formats.SAFETENSORS_DTYPES[d]) for s, (shape, d) in specs.items()}
