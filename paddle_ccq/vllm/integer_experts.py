# SPDX-License-Identifier: Apache-2.0
"""Routed experts in wint4: on vLLM's own int4 experts, or on the CPU operators."""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform

from ..codec import formats
from ..errors import CcqError
from ..ops.dense import DenseMatrix
from . import layout
from .experts import PROJECTIONS, ExpertsMethod, _parameter

# vLLM's int4 experts have one scale a group; a channel's one scale is repeated for each of them.
# For few tokens it has a kernel of its own, which takes groups of up to 128.
_GROUP = 128


class Wint4ExpertsMethod(ExpertsMethod):
    """States plus 8 in uint8 [E, N, K/2], the earlier row in the low nibble."""

    format = "wint4"

    def allocate(self, layer: Any) -> None:
        self.group = group = _GROUP  # divides hidden size and width (ExpertsMethod)
        for part in PROJECTIONS:
            k, n = self.shape_of(part)
            _parameter(layer, f"ccq_{part}_weight", (self.experts, n, k // 2), torch.uint8)
            scales = (self.experts, n, k // group)
            _parameter(layer, f"ccq_{part}_scale", scales, torch.bfloat16)

    def _cut(
        self, projection: str, found: dict[str, tuple[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        _, n = self.shape_of(projection)
        columns, rows = self.shares[projection]
        whole_k = self.stored_k[projection]
        whole_n = n if projection == "down" or self.already_cut else 2 * self.stored_k["down"]
        specs = formats.tensor_specs("wint4", whole_k, whole_n)
        for suffix, (name, stored) in found.items():
            if tuple(stored.shape) != specs[suffix][0]:
                raise CcqError(
                    f"{name}: {list(stored.shape)}, wint4 of [{whole_k}, {whole_n}] has"
                    f" {list(specs[suffix][0])}"
                )
        raw = found["quant_weight"][1].view(torch.uint8)
        tiles = layout.cut_interleaved(raw, 4, columns, rows)
        states = [layout.states(part.to(self.device()), 4) for part in tiles]
        scale = found["weight_scale"][1]
        scales = [scale[p.source : p.source + p.size] for p in columns]
        return {"quant_weight": torch.cat(states), "weight_scale": torch.cat(scales)}

    def finish(
        self, layer: Any, expert: int, projection: str, tensors: dict[str, torch.Tensor]
    ) -> None:
        weight = getattr(layer, f"ccq_{projection}_weight").data
        weight[expert] = layout.nibble_pairs(tensors["quant_weight"])
        scale = getattr(layer, f"ccq_{projection}_scale").data
        scale[expert] = tensors["weight_scale"].to(scale.device)[:, None]

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        from vllm.model_executor.layers.fused_moe.config import int4_w4a16_moe_quant_config

        return int4_w4a16_moe_quant_config(
            w1_scale=layer.ccq_up_gate_scale,
            w2_scale=layer.ccq_down_scale,
            w1_zp=None,
            w2_zp=None,
            block_shape=[0, self.group],
        )

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        from vllm.model_executor.layers.fused_moe import fused_experts

        if self.moe_quant_config is None:
            self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        return fused_experts(
            x,
            layer.ccq_up_gate_weight,
            layer.ccq_down_weight,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=layer.activation,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            quant_config=self.moe_quant_config,
        )


class CpuWint4ExpertsMethod(Wint4ExpertsMethod):
    """The same on the CPU operators."""

    def allocate(self, layer: Any) -> None:
        self.matrices: dict[str, dict[int, DenseMatrix]] = {p: {} for p in PROJECTIONS}

    def finish(
        self, layer: Any, expert: int, projection: str, tensors: dict[str, torch.Tensor]
    ) -> None:
        states = (tensors["quant_weight"].to(torch.int16) - 8).to(torch.int8).t()
        scale = tensors["weight_scale"].to(torch.float32)
        made = DenseMatrix.from_states(states.numpy(), scale.numpy(), 4)
        self.matrices[projection][expert] = made

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def process_weights_after_loading(self, layer: Any) -> None:
        from .cpu_ops import SingleExperts, keep

        if not self.matrices["up_gate"]:
            return
        up, down = ([self.matrices[p][e] for e in range(self.experts)] for p in PROJECTIONS)
        layer.ccq_number = keep(SingleExperts(up, down))
        self.matrices = {p: {} for p in PROJECTIONS}

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        from .cpu_ops import experts

        return experts(x, topk_weights, self.choices(layer, topk_ids), layer.ccq_number)


def wint4_method(moe: Any, prefix: str, already_cut: bool) -> Wint4ExpertsMethod:
    """The method for this machine."""
    made = CpuWint4ExpertsMethod if current_platform.is_cpu() else Wint4ExpertsMethod
    return made(moe, prefix, already_cut)
