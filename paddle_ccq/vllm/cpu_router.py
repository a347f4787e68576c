# SPDX-License-Identifier: Apache-2.0
"""Routing on a processor with the router's correction bias, which vLLM's own CPU router leaves out.

vLLM 0.32's CPURouter looks at e_score_correction_bias for grouped routing only; a model of plain
softmax routing would choose other experts there than on a GPU, without a word.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch


def biased_softmax(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts chosen by softmax plus bias, weighed by softmax: float32 and int32 [T, topk]."""
    scores = torch.softmax(gating_output.float(), dim=-1)
    chosen = torch.topk(scores + bias.float().reshape(1, -1), topk, dim=-1)[1]
    weights = scores.gather(1, chosen)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, chosen.to(torch.int32)


def correct(model: torch.nn.Module) -> int:
    """Give every softmax router with a bias a function that uses it; how many there were."""
    found = 0
    for module in model.modules():
        router: Any = getattr(module, "router", None)
        bias = getattr(router, "e_score_correction_bias", None)
        if bias is None or getattr(router, "scoring_func", "") != "softmax":
            continue
        if not hasattr(router, "custom_routing_function"):
            continue  # none of the CPU's
        router.custom_routing_function = partial(biased_softmax, bias=bias)
        found += 1
    return found
