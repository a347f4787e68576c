# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of each family: of arrays, or by transformers' own classes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from paddle_ccq.families.registry import read_config

from .synthetic import write_tensors

Tensors = dict[str, np.ndarray]

SIZES = {
    "vocab_size": 96,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
EXPERTS = {"intermediate_size": 256, "moe_intermediate_size": 128}
LATENT = {
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
    "num_key_value_heads": 4,
}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": 128,
}
QWEN35 = {
    **SIZES,
    **EXPERTS,
    "model_type": "qwen3_5_moe_text",
    "num_hidden_layers": 2,
    "num_experts": 4,
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}


@dataclass(frozen=True)
class Case:
    """A family and a config.json of it; `auto` is transformers' class that builds the model."""

    name: str
    family: str
    config: dict[str, Any]
    auto: str = "AutoModelForCausalLM"


CASES = (
    Case(
        "deepseek-v3",
        "DeepSeek-V3",
        {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **SIZES,
            **EXPERTS,
            **LATENT,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 1,
        },
    ),
    Case(
        "deepseek-v3-whole-queries",
        "DeepSeek-V3",
        {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **SIZES,
            **EXPERTS,
            **LATENT,
            "q_lora_rank": None,
            "n_routed_experts": 4,
            "n_shared_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "num_nextn_predict_layers": 0,
        },
    ),
    Case(
        "qwen3-moe",
        "Qwen3-MoE",
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            **SIZES,
            **EXPERTS,
            "head_dim": 48,
            "num_experts": 4,
            "mlp_only_layers": [0],
        },
    ),
    Case(
        "glm-4.5",
        "GLM-4.5",
        {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            **SIZES,
            **EXPERTS,
            "head_dim": 32,
            "attention_bias": True,
            "use_qk_norm": True,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 1,
        },
    ),
    Case(
        "glm-4.5-air",
        "GLM-4.5",
        {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            **SIZES,
            **EXPERTS,
            "head_dim": 32,
            "attention_bias": True,
            "use_qk_norm": False,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    Case(
        "minimax-m2",
        "MiniMax-M2",
        {
            "architectures": ["MiniMaxM2ForCausalLM"],
            "model_type": "minimax_m2",
            **SIZES,
            "intermediate_size": 128,
            "head_dim": 32,
            "num_local_experts": 4,
        },
    ),
    Case(
        "qwen3.5-moe",
        "Qwen3.5-MoE",
        {"architectures": ["Qwen3_5MoeForCausalLM"], **QWEN35},
    ),
    Case(
        "qwen3.5-moe-vision",
        "Qwen3.5-MoE",
        {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "model_type": "qwen3_5_moe",
            "dtype": "bfloat16",
            "text_config": QWEN35,
            "vision_config": VISION,
            "tie_word_embeddings": False,
        },
        auto="AutoModelForImageTextToText",
    ),
)
# Apart from the others: transformers holds its experts in two modules.
ERNIE_VL = Case(
    "ernie-4.5-vl",
    "ERNIE-4.5-VL",
    {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "model_type": "ernie4_5_vl_moe",
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "text_config": {
            **{key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")},
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 256,
            "moe_intermediate_size": [256, 128],
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500000.0,
                "mrope_section": [6, 6, 4],
            },
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
        },
        "image_token_id": 90,
        "image_start_token_id": 91,
        "image_end_token_id": 92,
        "video_start_token_id": 93,
        "video_end_token_id": 94,
        "video_token_id": 95,
    },
    auto="AutoModelForImageTextToText",
)


def by_name(name: str) -> Case:
    """The case of that name."""
    return next(case for case in (*CASES, ERNIE_VL) if case.name == name)


def random_tensors(case: Case, seed: int = 0) -> Tensors:
    """Random arrays under the names that test_family_names.py holds against transformers."""
    rng = np.random.default_rng(seed)
    found: Tensors = {}
    config = read_config(case.config)
    for tensor in config.tensors.values():
        if config.is_prediction(tensor):
            continue
        for part in tensor.sources["pt"].parts:
            values = 0.05 * rng.standard_normal(part.shape, dtype=np.float32)
            if part.name.endswith("norm.weight"):
                values += 1
            exact = part.name.endswith("e_score_correction_bias")
            found[part.name] = values if exact else values.astype(ml_dtypes.bfloat16)
    return found


def stacked_tensors(tensors: Tensors) -> Tensors:
    """The same model in transformers' own layout: stacks of experts, routers under `mlp`."""
    found = {n: v for n, v in tensors.items() if ".experts." not in n}
    modules = {n.split(".experts.")[0] for n in tensors if ".experts." in n}
    for module in modules:
        names = ("gate_proj", "up_proj", "down_proj")
        if f"{module}.experts.0.w1.weight" in tensors:
            names = ("w1", "w3", "w2")
        count = len({n for n in tensors if n.startswith(f"{module}.experts.")}) // 3
        each = [
            [tensors[f"{module}.experts.{e}.{name}.weight"] for name in names] for e in range(count)
        ]
        own = module.replace("block_sparse_moe", "mlp")
        found[f"{own}.experts.gate_up_proj"] = np.stack([np.concatenate(m[:2]) for m in each])
        found[f"{own}.experts.down_proj"] = np.stack([m[2] for m in each])
    return {n.replace("block_sparse_moe", "mlp"): v for n, v in found.items()}


def write_source(folder: Path, config: dict[str, Any], tensors: Tensors, shards: int = 3) -> Path:
    """A folder of these tensors."""
    folder.mkdir(parents=True)
    write_tensors(folder, tensors, shards)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_model(case: Case, seed: int = 0) -> Any:
    """A random model of the case, in its dtype."""
    import torch
    import transformers

    values = {k: v for k, v in case.config.items() if k != "architectures"}
    kind = values.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **values)
    torch.manual_seed(seed)
    model = getattr(transformers, case.auto).from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, value in model.named_parameters():
            # Classes initialize some of them with zeros or ones, which would hide a lost tensor.
            noise = torch.randn(value.shape)
            value.copy_(1 + 0.1 * noise if name.endswith("norm.weight") else 0.05 * noise)
        for name, value in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                value.copy_(0.1 * torch.randn(value.shape))
    return model.eval()


def save(model: Any, folder: Path, *, stacked: bool = False) -> None:
    """Write the model as transformers does; `stacked`: in its own layout."""
    model.save_pretrained(folder, save_original_format=not stacked)


@cache
def _stored_shapes(name: str, stacked: bool) -> tuple[str, dict[str, tuple[int, ...]]]:
    with TemporaryDirectory() as folder:
        save(random_model(by_name(name)), Path(folder), stacked=stacked)
        shapes = {}
        for path in Path(folder).glob("*.safetensors"):
            with safe_open(path, "np") as file:
                for tensor in file.keys():  # noqa: SIM118 (not a dictionary)
                    shapes[tensor] = tuple(file.get_slice(tensor).get_shape())
        return (Path(folder) / "config.json").read_text(), shapes


def stored_shapes(
    case: Case, stacked: bool = False
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """config.json as transformers writes it, and the shape of every tensor that it saves."""
    config, shapes = _stored_shapes(case.name, stacked)
    return json.loads(config), shapes
