# SPDX-License-Identifier: Apache-2.0
"""Routed experts in WINT2 and in the 2.5- and 2.75-bit formats, on this package's kernels."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.platforms import current_platform

from .. import ops
from ..codec import formats
from ..codec.floats import BFLOAT16
from ..codec.row_order import FASTDEPLOY_2_1, PLAIN
from ..errors import CcqError
from . import layout
from .layout import Piece

_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
PROJECTIONS = ("up_gate", "down")


class ExpertsMethod(FusedMoEMethodBase):
    """What all stored formats have in common: cutting for a rank, and who has arrived.

    A matrix is cut and handed to `finish` once all its stored tensors have come, so that no more
    than one expert is on the card beside the layer itself.
    """

    format = ""

    def __init__(self, moe: Any, prefix: str, already_cut: bool) -> None:
        super().__init__(moe)
        self.prefix = prefix
        self.already_cut = already_cut

    @property
    def topk_indices_dtype(self) -> torch.dtype:
        return torch.int64

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        parallel = self.moe.moe_parallel_config
        if parallel.use_all2all_kernels:
            raise CcqError(
                f"{self.prefix}: expert parallelism together with data parallelism needs vLLM's"
                " all-to-all kernels, which take no weights of this format; use one of the two"
            )
        self.experts, self.hidden = num_experts, hidden_size
        self.width = intermediate_size_per_partition
        if self.width % 128 or self.hidden % 128:
            raise CcqError(
                f"{self.prefix}: hidden size {self.hidden} and a rank's width {self.width} must be"
                " multiples of 128; use fewer ranks or --enable-expert-parallel"
            )
        rank, size = (0, 1) if self.already_cut else (parallel.tp_rank, parallel.tp_size)
        full = self.width * size
        self.stored_k = {"up_gate": hidden_size, "down": full}
        self.shares = {
            "up_gate": (layout.pieces([full, full], rank, size), Piece(0, 0, hidden_size)),
            "down": ([Piece(0, 0, hidden_size)], Piece(0, rank * self.width, self.width)),
        }
        self.pending: dict[tuple[int, str], dict[str, tuple[str, torch.Tensor]]] = {}
        self.done: set[tuple[int, str]] = set()
        self.allocate(layer)

    def shape_of(self, projection: str) -> tuple[int, int]:
        """(K, N) of one expert's matrix on this rank."""
        if projection == "up_gate":
            return self.hidden, 2 * self.width
        return self.width, self.hidden

    def place(
        self, layer: Any, expert: int, projection: str, suffix: str, stored: Any, name: str
    ) -> None:
        """Take up one stored tensor; `expert` counts over all ranks, `name` is for errors.

        Raises:
            CcqError: if it does not fit the layer.
        """
        local = _local(layer, expert)
        if local < 0:
            return
        key = (local, projection)
        found = self.pending.setdefault(key, {})
        found[suffix] = (name, stored)
        if found.keys() != self.suffixes():
            if suffix not in self.suffixes():
                raise CcqError(f"{name}: experts of {self.prefix} are {self.format}, without such")
            return
        del self.pending[key]
        self.finish(layer, local, projection, self._cut(projection, found))
        self.done.add(key)

    def suffixes(self) -> set[str]:
        return set(formats.tensor_specs(self.format, 128, 128))

    def _cut(
        self, projection: str, found: dict[str, tuple[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """A rank's part of every stored tensor of one matrix, on the layer's device."""
        k, n = self.shape_of(projection)
        columns, rows = self.shares[projection]
        whole_k = self.stored_k[projection]
        whole_n = n if projection == "down" or self.already_cut else 2 * self.stored_k["down"]
        wanted = formats.tensor_specs(self.format, whole_k, whole_n)
        own = formats.tensor_specs(self.format, k, n)
        result = {}
        for suffix, (name, stored) in found.items():
            shape, dtype = wanted[suffix]
            if tuple(stored.shape) != shape or stored.dtype != _DTYPES[dtype]:
                raise CcqError(
                    f"{name}: {stored.dtype} {list(stored.shape)}, {self.format} of"
                    f" [{whole_k}, {whole_n}] has {_DTYPES[dtype]} {list(shape)}"
                )
            part = torch.empty(own[suffix][0], dtype=stored.dtype, device=self.device())
            for target, source in layout.ccq_slices(self.format, suffix, whole_k, columns, rows):
                part[target] = stored[source].to(part.device)
            result[suffix] = part
        return result

    def device(self) -> torch.device:
        return torch.device("cpu" if current_platform.is_cpu() else current_platform.device_type)

    def missing(self, layer: Any) -> list[str]:
        """The matrices that never came whole."""
        return [
            f"expert {e} {p}_proj"
            for e in range(self.experts)
            for p in PROJECTIONS
            if (e, p) not in self.done
        ]

    def choices(self, layer: Any, topk_ids: torch.Tensor) -> torch.Tensor:
        """Experts by their number on this rank; -1 for those of others."""
        mapping = layer.expert_map
        ids = topk_ids if mapping is None else mapping[topk_ids]
        return ids.to(torch.int64)

    def allocate(self, layer: Any) -> None:
        raise NotImplementedError

    def finish(
        self, layer: Any, expert: int, projection: str, tensors: dict[str, torch.Tensor]
    ) -> None:
        raise NotImplementedError


def _local(layer: Any, expert: int) -> int:
    mapping = layer.expert_map
    return expert if mapping is None else int(mapping[expert])


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
        self.general_pairs = 0

    def allocate(self, layer: Any) -> None:
        e = self.experts
        for part in PROJECTIONS:
            k, n = self.shape_of(part)
            _parameter(layer, f"ccq_{part}_quant", (e, n * k // 4), torch.uint8)
            _parameter(layer, f"ccq_{part}_scales", (e, n * k // 128), torch.uint8)
            _parameter(layer, f"ccq_{part}_columns", (2, e, 2 * n), torch.int32)
        kinds = torch.full((2, e), -1, dtype=torch.int32)
        layer.register_buffer("ccq_pair_kinds", kinds, persistent=False)

    def finish(
        self, layer: Any, expert: int, projection: str, tensors: dict[str, torch.Tensor]
    ) -> None:
        from .torch_ops import repack_wint2

        quant, scales, columns = self.parameters(layer, projection)
        kind = layer.ccq_pair_kinds[PROJECTIONS.index(projection), expert : expert + 1]
        columns[:, expert] = repack_wint2(tensors, quant[expert], scales[expert], kind)

    def parameters(self, layer: Any, projection: str) -> list[torch.Tensor]:
        return [
            getattr(layer, f"ccq_{projection}_{x}").data for x in ("quant", "scales", "columns")
        ]

    def process_weights_after_loading(self, layer: Any) -> None:
        kinds = layer.ccq_pair_kinds.amax(dim=1).tolist()
        self.general_pairs = int(kinds[0] > 0) | int(kinds[1] > 0) << 1

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        from .torch_ops import experts_wint2

        return experts_wint2(
            x,
            topk_weights.to(torch.float32),
            self.choices(layer, topk_ids),
            self.parameters(layer, "up_gate"),
            self.parameters(layer, "down"),
            self.width,
            self.general_pairs,
            self.row_order,
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
                _parameter(layer, f"ccq_{part}_{suffix}", full, _DTYPES[dtype])

    def finish(
        self, layer: Any, expert: int, projection: str, tensors: dict[str, torch.Tensor]
    ) -> None:
        for suffix, value in tensors.items():
            getattr(layer, f"ccq_{projection}_{suffix}").data[expert] = value

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        from ..ops.gpu_abi import SPARE_FORMATS
        from .torch_ops import experts_spare

        up_gate, down = (
            [getattr(layer, f"ccq_{p}_{s}") for s in ("quant_weight", "super_scales")]
            for p in PROJECTIONS
        )
        ids, routing_weights = self.choices(layer, topk_ids), topk_weights.to(torch.float32)
        return experts_spare(x, routing_weights, ids, up_gate, down, SPARE_FORMATS[self.format])


class CpuExpertsMethod(ExpertsMethod):
    """Any of the formats on the CPU operators."""

    def __init__(
        self, moe: Any, prefix: str, already_cut: bool, format: str, row_order: str
    ) -> None:
        super().__init__(moe, prefix, already_cut)
        self.format = format
        self.row_order = row_order if format == "wint2" else PLAIN
        self.packed: dict[str, dict[int, Any]] = {p: {} for p in PROJECTIONS}

    def allocate(self, layer: Any) -> None:
        self.packed = {p: {} for p in PROJECTIONS}

    def finish(
        self, layer: Any, expert: int, projection: str, tensors: dict[str, torch.Tensor]
    ) -> None:
        arrays = {suffix: _numpy(value) for suffix, value in tensors.items()}
        self.packed[projection][expert] = ops.repack(self.format, arrays, self.row_order)

    def process_weights_after_loading(self, layer: Any) -> None:
        from .cpu_ops import keep

        if not self.packed["up_gate"]:
            return
        up, down = (tuple(self.packed[p][e] for e in range(self.experts)) for p in PROJECTIONS)
        layer.ccq_number = keep(ops.PackedExperts(up, down))
        self.packed = {p: {} for p in PROJECTIONS}

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


def _numpy(value: torch.Tensor) -> Any:
    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.int16).numpy().view(BFLOAT16)
    return value.contiguous().numpy()
