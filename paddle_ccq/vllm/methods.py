# SPDX-License-Identifier: Apache-2.0
"""Which method runs routed experts of a format on this machine."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

from .experts import ExpertsMethod


def experts_method(
    moe: Any, prefix: str, already_cut: bool, format: str, row_order: str
) -> ExpertsMethod:
    """The method for a layer's experts.

    Args:
        moe: vLLM's FusedMoEConfig.
        already_cut: whether the checkpoint has rank folders.
        format: of this layer's experts.
        row_order: of WINT2 rows.
    """
    if current_platform.is_cpu():
        from . import cpu_experts

        if format == "wint4":
            return cpu_experts.CpuWint4ExpertsMethod(moe, prefix, already_cut)
        return cpu_experts.CpuCodedExpertsMethod(moe, prefix, already_cut, format, row_order)
    from . import gpu_experts

    if format == "wint4":
        return gpu_experts.Wint4ExpertsMethod(moe, prefix, already_cut)
    if format == "wint2":
        return gpu_experts.Wint2ExpertsMethod(moe, prefix, already_cut, row_order)
    if format == "ccq-2t":
        return gpu_experts.TrellisExpertsMethod(moe, prefix, already_cut)
    return gpu_experts.SpareExpertsMethod(moe, prefix, already_cut, format)
