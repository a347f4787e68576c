# SPDX-License-Identifier: Apache-2.0
"""Dense linear layers with wint8 weights, which stay 8 bits on the card."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear, RowParallelLinear
from vllm.platforms import current_platform

from ..codec.weight_only import COLUMN_MULTIPLE, TILE_ROWS
from ..errors import CcqError
from . import layout
from .layout import Piece


def _frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


class Wint8LinearMethod(LinearMethodBase):
    """y = x W + b with W stored as FastDeploy's wint8.

    On a GPU the weight is `ccq_weight` uint8 [N/16, K/64, 1024] with `ccq_scale` bfloat16 [N]; on
    a processor it is an object of the compiled core, `ccq_number`.
    """

    def __init__(self, prefix: str, already_cut: bool) -> None:
        self.prefix = prefix
        self.already_cut = already_cut

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Find a rank's part of the stored matrix and make room for it.

        Raises:
            CcqError: if the part is no wint8 matrix by itself.
        """
        k, n = input_size_per_partition, sum(output_partition_sizes)
        if k % TILE_ROWS or n % COLUMN_MULTIPLE:
            raise CcqError(
                f"{self.prefix}: a part of [{k}, {n}] is no wint8 matrix (K a multiple of"
                f" {TILE_ROWS}, N of {COLUMN_MULTIPLE}); use fewer ranks"
            )
        layer.ccq_shape = (k, n)
        layer.ccq_arrived = {}
        self.columns, self.rows = self._share(layer, k, output_partition_sizes)
        if current_platform.is_cpu():
            return
        from .torch_ops import counters_of

        units = (n // layout.UNIT_COLUMNS, k // TILE_ROWS, layout.UNIT_BYTES)
        layer.register_parameter("ccq_weight", _frozen(torch.empty(units, dtype=torch.uint8)))
        layer.register_parameter("ccq_scale", _frozen(torch.empty(n, dtype=params_dtype)))
        counters = torch.zeros(counters_of(n), dtype=torch.int32)
        layer.register_buffer("ccq_counters", counters, persistent=False)

    def _share(
        self, layer: torch.nn.Module, k: int, part_sizes: list[int]
    ) -> tuple[list[Piece], Piece]:
        """The columns and rows of the stored matrix that this rank holds."""
        if self.already_cut:
            return layout.whole(part_sizes), Piece(0, 0, k)
        rank, size = getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)
        if isinstance(layer, RowParallelLinear):
            return layout.whole(part_sizes), Piece(0, rank * k, k)
        if isinstance(layer, QKVParallelLinear):
            keys = layer.total_num_kv_heads * layer.head_size
            parts = [layer.total_num_heads * layer.head_size, keys, keys]
            copies = [1, layer.num_kv_head_replicas, layer.num_kv_head_replicas]
            return layout.pieces(parts, rank, size, copies), Piece(0, 0, k)
        return layout.pieces([p * size for p in part_sizes], rank, size), Piece(0, 0, k)

    def place(self, layer: torch.nn.Module, suffix: str, stored: torch.Tensor, name: str) -> None:
        """Take up one stored tensor of the layer; `name` is for errors.

        Raises:
            CcqError: if its shape or type is not the layer's.
        """
        try:
            if suffix == "weight_scale":
                parts = [stored[p.source : p.source + p.size] for p in self.columns]
                value = torch.cat(parts)
            elif suffix == "quant_weight" and stored.dtype == torch.int8:
                tiles = layout.cut_interleaved(stored, 8, self.columns, self.rows)
                device = "cpu" if current_platform.is_cpu() else layer.ccq_weight.device
                value = torch.cat([layout.states(part.to(device), 8) for part in tiles])
            else:
                raise ValueError(f"{stored.dtype} {suffix} is no tensor of wint8")
            k, n = layer.ccq_shape
            wanted = (n,) if suffix == "weight_scale" else (n, k)
            if tuple(value.shape) != wanted:
                raise ValueError(f"a rank's part is {list(value.shape)}, not {list(wanted)}")
        except (ValueError, RuntimeError) as error:
            raise CcqError(f"{name} {list(stored.shape)}: {error}") from None
        if current_platform.is_cpu():
            layer.ccq_arrived[suffix] = value
        elif suffix == "weight_scale":
            layer.ccq_scale.data.copy_(value)
            layer.ccq_arrived[suffix] = True
        else:
            layer.ccq_weight.data.copy_(layout.product_units(value))
            layer.ccq_arrived[suffix] = True

    def missing(self, layer: torch.nn.Module) -> list[str]:
        """Suffixes of the tensors that never came."""
        return [s for s in ("quant_weight", "weight_scale") if s not in layer.ccq_arrived]

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if not current_platform.is_cpu() or hasattr(layer, "ccq_number"):
            return
        from ..ops.dense import DenseMatrix
        from .cpu_ops import keep

        states = (layer.ccq_arrived["quant_weight"].to(torch.int16) - 128).to(torch.int8)
        scale = layer.ccq_arrived["weight_scale"].to(torch.float32)
        layer.ccq_number = keep(DenseMatrix.from_states(states.t().numpy(), scale.numpy(), 8))
        layer.ccq_arrived = {suffix: True for suffix in layer.ccq_arrived}

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if current_platform.is_cpu():
            from .cpu_ops import linear

            y = linear(x, layer.ccq_number, layer.ccq_shape[1])
        else:
            from .torch_ops import linear_w8

            y = linear_w8(x, layer.ccq_weight, layer.ccq_scale, layer.ccq_counters)
        return y if bias is None else y + bias
