# SPDX-License-Identifier: Apache-2.0
"""Routed experts on a GPU: this package's kernels, and vLLM's own int4 experts for wint4."""

from __future__ import annotations

from typing import Any

import torch

from ..codec import formats
from ..codec.row_order import FASTDEPLOY_2_1
from ..ops.gpu_abi import PAIRS_GENERAL, trellis_bytes
from . import layout
from .experts import DTYPES, PROJECTIONS, ExpertsMethod, Tensors, Wint4Experts

# vLLM's int4 experts have one scale a group; a channel's one scale is repeated for each of them.
# For few tokens it has a kernel of its own, which takes groups of up to 128.
_GROUP = 128


def _parameter(layer: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    value = torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    layer.register_parameter(name, value)
    return value


class Wint2ExpertsMethod(ExpertsMethod):
    """WINT2 on the grouped tensor-core product, in its own layout (custom_ops/gpu/moe/repack.h)."""

    format = "wint2"

    def __init__(self, moe: Any, prefix: str, already_cut: bool, row_order: str) -> None:
        super().__init__(moe, prefix, already_cut)
        self.row_order = int(row_order == FASTDEPLOY_2_1)
        self.pairs = [PAIRS_GENERAL] * 2

    def allocate(self, layer: Any) -> None:
        e = self.experts
        for part in PROJECTIONS:
            k, n = self.shape_of(part)
            _parameter(layer, f"ccq_{part}_quant", (e, n * k // 4), torch.uint8)
            _parameter(layer, f"ccq_{part}_scales", (e, n * k // 128), torch.uint8)
            _parameter(layer, f"ccq_{part}_columns", (2, e, 2 * n), torch.int32)
        kinds = torch.full((2, e), -1, dtype=torch.int32)
        layer.register_buffer("ccq_pair_kinds", kinds, persistent=False)

    def finish(self, layer: Any, expert: int, projection: str, tensors: Tensors) -> None:
        from .torch_ops import repack_wint2

        quant, scales, columns = self.parameters(layer, projection)
        kind = layer.ccq_pair_kinds[PROJECTIONS.index(projection), expert : expert + 1]
        columns[:, expert] = repack_wint2(tensors, quant[expert], scales[expert], kind)

    def parameters(self, layer: Any, projection: str) -> list[torch.Tensor]:
        """Of all experts' matrices: codes, local scales, and what each column has once."""
        return [
            getattr(layer, f"ccq_{projection}_{x}").data for x in ("quant", "scales", "columns")
        ]

    def process_weights_after_loading(self, layer: Any) -> None:
        kinds = layer.ccq_pair_kinds.amax(dim=1).tolist()
        self.pairs = [int(kind > 0) for kind in kinds]

    def multiply(
        self, layer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        from .torch_ops import experts_packed

        return experts_packed(
            x,
            weights.to(torch.float32),
            self.choices(layer, ids),
            self.parameters(layer, "up_gate"),
            self.parameters(layer, "down"),
            self.width,
            self.pairs,
            self.row_order,
        )


class TrellisExpertsMethod(ExpertsMethod):
    """CCQ-2T on the grouped tensor-core product (custom_ops/gpu/moe/trellis_repack.h)."""

    format = "ccq-2t"

    def allocate(self, layer: Any) -> None:
        for part in PROJECTIONS:
            k, n = self.shape_of(part)
            size, columns = trellis_bytes(k, n)
            _parameter(layer, f"ccq_{part}_units", (self.experts, size), torch.uint8)
            _parameter(layer, f"ccq_{part}_columns", (self.experts, columns // 4), torch.float32)

    def cut(self, projection: str, stored: Tensors) -> Tensors:
        """A rank's part, and what the kernels' repacking needs beside it."""
        result = super().cut(projection, stored)
        before = self.byte_before(projection, stored).to(result["quant_weight"].device)
        return {**result, "before": before}

    def finish(self, layer: Any, expert: int, projection: str, tensors: Tensors) -> None:
        from .torch_ops import repack_trellis

        units, columns = self.parameters(layer, projection)
        repack_trellis(tensors, units[expert], columns[expert])

    def parameters(self, layer: Any, projection: str) -> list[torch.Tensor]:
        """Of all experts' matrices: units of codes and local scales, and super scales."""
        return [getattr(layer, f"ccq_{projection}_{x}").data for x in ("units", "columns")]

    def multiply(
        self, layer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        from ..ops.gpu_abi import PAIRS_TRELLIS, ROWS_PLAIN
        from .torch_ops import experts_packed

        return experts_packed(
            x,
            weights.to(torch.float32),
            self.choices(layer, ids),
            self.parameters(layer, "up_gate"),
            self.parameters(layer, "down"),
            self.width,
            [PAIRS_TRELLIS] * 2,
            ROWS_PLAIN,
        )


class SpareExpertsMethod(ExpertsMethod):
    """2.5 and 2.75 bits, multiplied as stored (custom_ops/gpu/moe/linear_ccq.h)."""

    def __init__(self, moe: Any, prefix: str, already_cut: bool, format: str) -> None:
        super().__init__(moe, prefix, already_cut)
        self.format = format

    def allocate(self, layer: Any) -> None:
        for part in PROJECTIONS:
            k, n = self.shape_of(part)
            for suffix, (shape, dtype) in formats.tensor_specs(self.format, k, n).items():
                full = (self.experts, *shape)
                _parameter(layer, f"ccq_{part}_{suffix}", full, DTYPES[dtype])

    def finish(self, layer: Any, expert: int, projection: str, tensors: Tensors) -> None:
        for suffix, value in tensors.items():
            getattr(layer, f"ccq_{projection}_{suffix}").data[expert] = value

    def multiply(
        self, layer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        from ..ops.gpu_abi import SPARE_FORMATS
        from .torch_ops import experts_spare

        up_gate, down = (
            [getattr(layer, f"ccq_{p}_{s}") for s in ("quant_weight", "super_scales")]
            for p in PROJECTIONS
        )
        chosen, format = self.choices(layer, ids), SPARE_FORMATS[self.format]
        return experts_spare(x, weights.to(torch.float32), chosen, up_gate, down, format)


class Wint4ExpertsMethod(Wint4Experts):
    """On vLLM's own int4 experts: uint8 [E, N, K/2], the earlier row in the low nibble.

    The same bytes serve few tokens and many by this package (custom_ops/gpu/moe/linear_w4.h).
    """

    def allocate(self, layer: Any) -> None:
        self.group = group = _GROUP  # divides hidden size and width (ExpertsMethod)
        for part in PROJECTIONS:
            k, n = self.shape_of(part)
            _parameter(layer, f"ccq_{part}_weight", (self.experts, n, k // 2), torch.uint8)
            scales = (self.experts, n, k // group)
            _parameter(layer, f"ccq_{part}_scale", scales, torch.bfloat16)

    def finish(self, layer: Any, expert: int, projection: str, tensors: Tensors) -> None:
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

    def multiply(
        self, layer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        from vllm.model_executor.layers.fused_moe import fused_experts

        from . import torch_ops

        if torch_ops.serves_w4(len(x)):
            up_gate, down = (
                [getattr(layer, f"ccq_{p}_{s}") for s in ("weight", "scale")] for p in PROJECTIONS
            )
            chosen = self.choices(layer, ids)
            return torch_ops.experts_w4(x, weights.to(torch.float32), chosen, up_gate, down)
        if self.moe_quant_config is None:
            self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        return fused_experts(
            x,
            layer.ccq_up_gate_weight,
            layer.ccq_down_weight,
            topk_weights=weights,
            topk_ids=ids,
            activation=layer.activation,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            quant_config=self.moe_quant_config,
        )
