# SPDX-License-Identifier: Apache-2.0
"""The 300B's shape with random weights in vLLM: configurations, and a load format that makes them.

`use_in_all_processes` lets every process of vLLM find the load format, as a plugin of its own.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

LOAD_FORMAT = "ccq_random"
# Where this is set, each process says what its loading took.
SPLIT = "CCQ_BENCH_SPLIT"
# ERNIE-4.5-300B-A47B.
SHAPE = {
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
# What vLLM reads for integers of 4 bits with a scale for 128 weights of a column.
INT4 = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "desc_act": False,
    "lm_head": False,
    "modules_in_block_to_quantize": [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "mlp.experts",
    ],
}


def shape_plan(layers: int, wint4_end: int) -> Any:
    """The plan of a checkpoint of this shape."""
    from paddle_ccq.families.registry import read_config
    from paddle_ccq.targets.fastdeploy.layout import build_plan

    raw = dict(SHAPE, num_hidden_layers=layers, moe_layer_end_index=layers - 1)
    return build_plan(read_config(raw), format="wint2", wint4_end_layer=wint4_end)


def shape_folder(target: Path, layers: int, wint4_end: int, peer: bool = False) -> Path:
    """A folder with the config.json of the 300B's shape alone; `peer`: with 4 bits."""
    from paddle_ccq.targets.fastdeploy.config import output_config

    if peer:
        raw = dict(SHAPE, num_hidden_layers=layers, moe_layer_end_index=layers - 1)
        written = raw | {"quantization_config": INT4}
    else:
        plan = shape_plan(layers, wint4_end)
        written = output_config(plan, {"row_order": plan.row_order})
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(written))
    return target


def _fill(module: Any) -> None:
    """Every parameter of a layer that is not this package's."""
    for name, parameter in module.named_parameters(recurse=False):
        if "norm" in type(module).__name__.lower():
            parameter.data.fill_(1)
        elif "scale" in name:
            parameter.data.uniform_(1e-3, 3e-3)
        elif parameter.is_floating_point():
            parameter.data.normal_(0, 0.02)
        elif parameter.numel():
            parameter.data.random_()


def _randomize_linear(method: Any, layer: Any) -> None:
    layer.ccq_weight.data.random_(0, 256)
    layer.ccq_scale.data.uniform_(1e-4, 3e-4)


def _randomize_wint2(method: Any, layer: Any) -> None:
    import torch

    from paddle_ccq.vllm.experts import PROJECTIONS

    device = method.device()
    byte, floats = ({"dtype": d, "device": device} for d in (torch.uint8, torch.float32))
    for expert in range(method.experts):
        for part in PROJECTIONS:
            k, n = method.shape_of(part)
            tensors = {
                "quant_weight": torch.empty((k // 4, n), **byte).random_(0, 256),
                "weight_scale": torch.empty((k // 128, n), **byte).random_(0, 256),
                "super_scales": torch.full((n,), 2e-4, dtype=torch.bfloat16, device=device),
                "code_scale": torch.full((n,), 127.0, **floats),
                "code_zp": torch.full((n,), 40.0, **floats),
            }
            method.finish(layer, expert, part, tensors)


def _randomize_wint4(method: Any, layer: Any) -> None:
    for part in ("up_gate", "down"):
        getattr(layer, f"ccq_{part}_weight").data.random_(0, 256)
        getattr(layer, f"ccq_{part}_scale").data.uniform_(1e-3, 3e-3)


def _split_loading() -> None:
    """Loading prints the time in vLLM's reader, and that of placing, which waits for pages too."""
    import time
    from collections.abc import Iterator

    from paddle_ccq.vllm import loading

    ahead = loading.ahead

    def timed(folder: str, weights: Any) -> Iterator[tuple[str, Any]]:
        reader, placed, count, last = 0.0, 0.0, 0, time.perf_counter()
        for name, tensor in ahead(folder, weights):
            now = time.perf_counter()
            reader += now - last
            yield name, tensor
            last = time.perf_counter()
            placed += last - now
            count += 1
        print(f"{count} tensors: reader {reader:.1f} s, placing {placed:.1f} s", flush=True)

    loading.ahead = timed


def register() -> None:
    """The load format that fills every layer with random stored tensors, on the card."""
    import torch
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    from paddle_ccq.vllm import dense, gpu_experts, plugin

    @register_model_loader(LOAD_FORMAT)
    class RandomLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            return

        def load_weights(self, model: Any, model_config: Any) -> None:
            for module in model.modules():
                fill = getattr(getattr(module, "quant_method", None), "ccq_randomize", None)
                if fill is not None:
                    fill(module)
                else:
                    _fill(module)
            torch.cuda.synchronize()

    dense.Wint8LinearMethod.ccq_randomize = _randomize_linear
    gpu_experts.Wint2ExpertsMethod.ccq_randomize = _randomize_wint2
    gpu_experts.Wint4ExpertsMethod.ccq_randomize = _randomize_wint4
    plugin.register()
    if os.environ.get(SPLIT):
        _split_loading()
    # The class itself, for a name would be looked at in another process of 20 s.
    from vllm.model_executor.models import ModelRegistry

    from paddle_ccq.vllm.model import CcqErnieMoeForCausalLM

    ModelRegistry.register_model(SHAPE["architectures"][0], CcqErnieMoeForCausalLM)


def use_in_all_processes() -> None:
    """Make this module a plugin of vLLM, for this process and for those that it starts."""
    folder = Path(tempfile.mkdtemp(prefix="ccq-bench-"))
    info = folder / "ccq_bench-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ccq-bench\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nccq_bench = vllm_random:register\n"
    )
    here = Path(__file__).resolve().parent
    paths = [str(folder), str(here), str(here.parents[1])]
    sys.path[:0] = paths
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(paths + ([known] if known else []))
