# SPDX-License-Identifier: Apache-2.0
"""The shapes that vLLM's speed is measured with: config.json in 2 and in 4 bits, and memory."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# ERNIE-4.5-300B-A47B.
ERNIE_300B = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "vocab_size": 103424,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 54,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_bias": False,
    "tie_word_embeddings": False,
    "moe_num_experts": 64,
    "moe_k": 8,
    "moe_intermediate_size": 3584,
    "moe_num_shared_experts": 0,
    "moe_layer_start_index": 3,
    "moe_layer_end_index": 53,
    "moe_layer_interval": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
# DeepSeek-V3 without its layer for prediction, dense parts in bfloat16.
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "bfloat16",
}
# What vLLM reads for integers of 4 bits with a scale for 128 weights of a column.
INT4 = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "desc_act": False,
    "lm_head": False,
}
INT4_BYTES = 0.5 + 2 / 128  # of a weight


@dataclass(frozen=True)
class Shape:
    """A model's sizes.

    Attributes:
        raw: its config.json.
        int4: parts of the names of linear layers that have 4 bits in the peer's form.
        floats: the last parts of the names of those that have not.
    """

    raw: dict[str, Any]
    int4: tuple[str, ...]
    floats: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        return self.raw["num_hidden_layers"]

    def config(self, layers: int | None = None) -> dict[str, Any]:
        """config.json of the first layers."""
        layers = layers or self.layers
        raw = dict(self.raw, num_hidden_layers=layers)
        if "moe_layer_end_index" in raw:
            raw["moe_layer_end_index"] = layers - 1
        return raw


_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.experts")
_SHARED = tuple(f"shared_experts.{part}_proj" for part in ("gate", "up", "down"))
SHAPES = {
    "ernie-300b": Shape(ERNIE_300B, (*(f"self_attn.{part}_proj" for part in "qkvo"), *_MLP)),
    # Latent attention's first matrices stay as they are: vLLM takes one of them apart.
    "deepseek-v3": Shape(
        DEEPSEEK_V3,
        ("self_attn.q_b_proj", "self_attn.o_proj", *_MLP, *_SHARED),
        ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    ),
}
DEFAULT = "ernie-300b"


def shape_plan(layers: int, wint4_end: int, name: str = DEFAULT, format: str = "wint2") -> Any:
    """The plan of a checkpoint of a shape: in FastDeploy's layout, of others in Hugging Face's."""
    from paddle_ccq.checkpoint.plan import PlanOptions, make_plan
    from paddle_ccq.checkpoint.source_tensors import expect
    from paddle_ccq.checkpoint.sources.scheme import SourceScheme
    from paddle_ccq.families.ernie45 import ERNIE45
    from paddle_ccq.families.registry import read_config
    from paddle_ccq.targets.fastdeploy.layout import FastDeploy
    from paddle_ccq.targets.huggingface.layout import HuggingFace

    raw = SHAPES[name].config(layers)
    config, target = read_config(raw), FastDeploy()
    if config.family is not ERNIE45:
        config = expect(config, SourceScheme.read(raw, Path("config.json")))
        target = HuggingFace()
    return make_plan(config, PlanOptions(target, format=format, wint4_end_layer=wint4_end))


def shape_folder(
    target: Path, layers: int, wint4_end: int, peer: bool = False, name: str = DEFAULT
) -> Path:
    """A folder with the config.json of a shape alone; `peer`: with 4 bits."""
    from paddle_ccq.targets.fastdeploy.config import output_config as of_fastdeploy
    from paddle_ccq.targets.huggingface.config import output_config
    from paddle_ccq.targets.huggingface.layout import HuggingFace

    if peer:
        shape = SHAPES[name]
        four = {"quantization_config": INT4 | {"modules_in_block_to_quantize": [*shape.int4]}}
        written = shape.config(layers) | four
    else:
        plan = shape_plan(layers, wint4_end, name)
        own = isinstance(plan.target, HuggingFace)
        written = (output_config if own else of_fastdeploy)(plan, {"row_order": plan.row_order})
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(written))
    return target


def card_memory(name: str, peer: bool, serve: Any) -> Any:
    """What the fullest card holds of a shape, as `python -m paddle_ccq.vllm.check` works it out.

    Args:
        peer: with 4 bits in place of wint2.
        serve: a paddle_ccq.vllm.check.ServeConfig.

    Raises:
        CcqError: if the cards can't share the model.
    """
    from paddle_ccq.families.ernie45 import ERNIE45
    from paddle_ccq.vllm import memory, packed_memory
    from paddle_ccq.vllm.claims import Claim, check_parallel
    from paddle_ccq.vllm.packed_claims import check_packed_parallel

    plan = shape_plan(SHAPES[name].layers, -1, name)
    if plan.config.family is ERNIE45 and not peer:
        check_parallel(plan.config, Claim("wint2", -1, None, ()), serve.parallel, 1)
        return memory.card_memory(plan, serve)
    check_packed_parallel(plan.config, serve.parallel)
    found = packed_memory.card_memory(plan, serve)
    return replace(found, weights=_int4_bytes(name, plan, serve.parallel)) if peer else found


def _int4_bytes(name: str, plan: Any, parallel: Any) -> int:
    """Weights of the fullest card with 4 bits, pipelines apart."""
    from paddle_ccq.vllm.packed_memory import is_shared

    total = 0.0
    for planned in plan.tensors:
        tensor = planned.tensor
        four = tensor.is_linear and tensor.stem.rpartition(".")[2] not in SHAPES[name].floats
        size = planned.weights * (INT4_BYTES if four else 2)
        total += size / parallel.tensor if tensor.is_expert or is_shared(planned) else size
    return int(total)
