# SPDX-License-Identifier: Apache-2.0
"""Random weights in vLLM: a load format that makes them, on the card.

`use_in_all_processes` lets every process of vLLM find the load format, as a plugin of its own.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

LOAD_FORMAT = "ccq_random"
# Where this is set, each process says what its loading took.
SPLIT = "CCQ_BENCH_SPLIT"
# Where this is set, vllm_mla.py's attention is registered.
LATENT = "CCQ_BENCH_LATENT"


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
    import torch

    if not hasattr(layer, "ccq_weight"):  # on a processor
        k, n = layer.ccq_shape
        states = torch.empty((n, k), dtype=torch.uint8).random_(0, 256)
        scale = torch.empty(n).uniform_(1e-4, 3e-4)
        layer.ccq_arrived = {"quant_weight": states, "weight_scale": scale}
        return
    layer.ccq_weight.data.random_(0, 256)
    layer.ccq_scale.data.uniform_(1e-4, 3e-4)


def _randomize_wint2(method: Any, layer: Any) -> None:
    import torch

    from paddle_ccq.vllm.experts import PROJECTIONS

    if method.format != "wint2":
        raise SystemExit(f"{LOAD_FORMAT}: no random experts in {method.format}")

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
    from vllm.platforms import current_platform

    from paddle_ccq.vllm import dense, plugin

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
            if torch.cuda.is_available():
                torch.cuda.synchronize()

    dense.Wint8LinearMethod.ccq_randomize = _randomize_linear
    if current_platform.is_cpu():
        from paddle_ccq.vllm import cpu_experts

        cpu_experts.CpuCodedExpertsMethod.ccq_randomize = _randomize_wint2
    else:
        from paddle_ccq.vllm import gpu_experts

        gpu_experts.Wint2ExpertsMethod.ccq_randomize = _randomize_wint2
        gpu_experts.Wint4ExpertsMethod.ccq_randomize = _randomize_wint4
    plugin.register()
    if os.environ.get(SPLIT):
        _split_loading()
    if os.environ.get(LATENT):
        import vllm_mla

        vllm_mla.register()
    # The classes themselves, for a name would be looked at in another process of 20 s.
    from vllm.model_executor.models import ModelRegistry

    from paddle_ccq.vllm import model, packed_models

    ModelRegistry.register_model("Ernie4_5_MoeForCausalLM", model.CcqErnieMoeForCausalLM)
    packed_models._registered.add("DeepseekV3ForCausalLM")
    ModelRegistry.register_model("DeepseekV3ForCausalLM", model.CcqDeepseekV3ForCausalLM)


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
