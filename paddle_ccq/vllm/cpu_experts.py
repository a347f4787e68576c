# SPDX-License-Identifier: Apache-2.0
"""Routed experts on a processor: the package's CPU operators."""

from __future__ import annotations

from typing import Any

import torch

from .. import ops
from ..codec import formats, trellis
from ..codec.floats import BFLOAT16
from ..ops.dense import DenseMatrix
from .experts import PROJECTIONS, ExpertsMethod, Tensors, Wint4Experts


class CpuExpertsMethod(ExpertsMethod):
    """Matrices are packed as they come; the layer's experts become one object of the core."""

    def allocate(self, layer: Any) -> None:
        self.packed: dict[str, dict[int, Any]] = {p: {} for p in PROJECTIONS}

    def finish(self, layer: Any, expert: int, projection: str, tensors: Tensors) -> None:
        self.packed[projection][expert] = self.pack(tensors)

    def process_weights_after_loading(self, layer: Any) -> None:
        from .cpu_ops import keep

        if not self.packed["up_gate"]:
            return
        up, down = ([self.packed[p][e] for e in range(self.experts)] for p in PROJECTIONS)
        layer.ccq_number = keep(self.block(up, down))
        self.allocate(layer)

    def multiply(
        self, layer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        from .cpu_ops import experts

        return experts(x, weights, self.choices(layer, ids), layer.ccq_number)

    def pack(self, tensors: Tensors) -> Any:
        """One cut matrix as the operators read it."""
        raise NotImplementedError

    def block(self, up_gate: list[Any], down: list[Any]) -> Any:
        """All experts of the layer as one object."""
        raise NotImplementedError


class CpuCodedExpertsMethod(CpuExpertsMethod):
    """Any of the convolutional codes."""

    def __init__(
        self, moe: Any, prefix: str, already_cut: bool, format: str, row_order: str
    ) -> None:
        super().__init__(moe, prefix, already_cut)
        self.format = format
        self.row_order = formats.stored_order(format, row_order)

    def cut(self, projection: str, stored: Tensors) -> Tensors:
        result = super().cut(projection, stored)
        if self.format == trellis.NAME:
            result["before"] = self.byte_before(projection, stored)
        return result

    def pack(self, tensors: Tensors) -> Any:
        arrays = {suffix: _numpy(value) for suffix, value in tensors.items()}
        before = arrays.pop("before", None)
        return ops.repack(self.format, arrays, self.row_order, before)

    def block(self, up_gate: list[Any], down: list[Any]) -> Any:
        return ops.PackedExperts(tuple(up_gate), tuple(down))


class CpuWint4ExpertsMethod(Wint4Experts, CpuExpertsMethod):
    """wint4, one product an expert."""

    def pack(self, tensors: Tensors) -> DenseMatrix:
        states = (tensors["quant_weight"].to(torch.int16) - 8).to(torch.int8).t()
        scale = tensors["weight_scale"].to(torch.float32)
        return DenseMatrix.from_states(states.numpy(), scale.numpy(), 4)

    def block(self, up_gate: list[Any], down: list[Any]) -> Any:
        from .cpu_ops import SingleExperts

        return SingleExperts(up_gate, down)


def _numpy(value: torch.Tensor) -> Any:
    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.int16).numpy().view(BFLOAT16)
    return value.contiguous().numpy()
