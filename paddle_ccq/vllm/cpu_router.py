# SPDX-License-Identifier: Apache-2.0
"""Routing on a processor with the router's correction bias, which vLLM's own CPU router leaves out.

vLLM 0.32's CPURouter looks at e_score_correction_bias for grouped routing only: without groups a
model with softmax would choose other experts there than on a GPU, without a word, and one with
sigmoid stops.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

_SCORES = {"softmax": partial(torch.softmax, dim=-1), "sigmoid": torch.sigmoid}


def biased(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    bias: torch.Tensor,
    scoring: str,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts chosen by score plus bias, weighed by score: float32 and int32 [T, topk].

    Args:
        scoring: key of _SCORES.
        factor: of all weights.
    """
    scores = _SCORES[scoring](gating_output.float())
    chosen = torch.topk(scores + bias.float().reshape(1, -1), topk, dim=-1)[1]
    weights = scores.gather(1, chosen)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * factor, chosen.to(torch.int32)


def correct(model: torch.nn.Module) -> int:
    """Give every router without groups and with a bias a function that uses it; how many."""
    found = 0
    for module in model.modules():
        router: Any = getattr(module, "router", None)
        bias = getattr(router, "e_score_correction_bias", None)
        scoring = getattr(router, "scoring_func", "")
        if bias is None or scoring not in _SCORES or getattr(router, "use_grouped_topk", False):
            continue
        if not hasattr(router, "custom_routing_function"):
            continue  # none of the CPU's
        factor = getattr(router, "routed_scaling_factor", 1.0)
        router.custom_routing_function = partial(biased, bias=bias, scoring=scoring, factor=factor)
        found += 1
    return found
