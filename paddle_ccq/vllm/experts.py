# SPDX-License-Identifier: Apache-2.0
"""Routed experts as vLLM loads them: how stored tensors arrive, and what of them is a rank's.

What multiplies with them is in gpu_experts.py and cpu_experts.py.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.platforms import current_platform

from ..codec import formats
from ..errors import CcqError
from . import layout
from .layout import Piece

DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
PROJECTIONS = ("up_gate", "down")
Tensors = dict[str, torch.Tensor]  # by suffix, of one expert's matrix


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
        """The type in which the package's operators take experts' numbers."""
        return torch.int64

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: scales are the package's operators' own business, and vLLM's kernels do not run."""
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
        """Find a rank's part of the stored matrices and make room for it.

        Raises:
            CcqError: for sizes that do not divide among the ranks, and for expert parallelism
                together with data parallelism.
        """
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
        self.finish(layer, local, projection, self.cut(projection, self._whole(projection, found)))
        self.done.add(key)

    def byte_before(self, projection: str, stored: Tensors) -> torch.Tensor:
        """CCQ-2T's code bytes before a rank's first ones, uint8 [N]; 0 at a column's beginning.

        Rank folders are encoded apart, each from such a beginning.
        """
        columns, rows = self.shares[projection]
        codes = stored["quant_weight"]
        result = codes.new_zeros(self.shape_of(projection)[1])
        if rows.source:
            last = codes[rows.source // 4 - 1]
            for piece in columns:
                part = last[piece.source : piece.source + piece.size]
                result[piece.target : piece.target + piece.size] = part
        return result

    def suffixes(self) -> set[str]:
        """The stored tensors that make one matrix of the format, by suffix."""
        return set(formats.tensor_specs(self.format, 128, 128))

    def _whole(self, projection: str, found: dict[str, tuple[str, torch.Tensor]]) -> Tensors:
        """The stored tensors of one whole matrix, which must have the format's shapes and types."""
        k, n = self.stored_k[projection], self.shape_of(projection)[1]
        if projection == "up_gate" and not self.already_cut:
            n = 2 * self.stored_k["down"]
        specs = formats.tensor_specs(self.format, k, n)
        for suffix, (name, stored) in found.items():
            shape, dtype = specs[suffix]
            if tuple(stored.shape) != shape or stored.dtype != DTYPES[dtype]:
                raise CcqError(
                    f"{name}: {stored.dtype} {list(stored.shape)}, {self.format} of [{k}, {n}] has"
                    f" {DTYPES[dtype]} {list(shape)}"
                )
        return {suffix: stored for suffix, (_, stored) in found.items()}

    def cut(self, projection: str, stored: Tensors) -> Tensors:
        """A rank's part of every stored tensor of one matrix, on the layer's device."""
        columns, rows = self.shares[projection]
        whole_k = self.stored_k[projection]
        own = formats.tensor_specs(self.format, *self.shape_of(projection))
        uncut = all(piece.target == piece.source for piece in columns) and not rows.source
        result = {}
        for suffix, whole in stored.items():
            if uncut and tuple(whole.shape) == own[suffix][0] and self.device().type != "cpu":
                result[suffix] = whole.to(self.device())
                continue
            part = torch.empty(own[suffix][0], dtype=whole.dtype, device=self.device())
            if 2 * part.numel() >= whole.numel():
                # Columns are cut on the card: there a processor copies row after row, and waits
                # for each page of the file.
                whole = whole.to(part.device)
            for target, source in layout.ccq_slices(self.format, suffix, whole_k, columns, rows):
                part[target] = whole[source].to(part.device)
            result[suffix] = part
        return result

    def device(self) -> torch.device:
        """The device of this process, on which matrices are cut."""
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

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        return self.multiply(layer, x, topk_weights, topk_ids)

    def allocate(self, layer: Any) -> None:
        """Make room for the cut tensors of all experts of this rank."""
        raise NotImplementedError

    def finish(self, layer: Any, expert: int, projection: str, tensors: Tensors) -> None:
        """Put one cut matrix into its place."""
        raise NotImplementedError

    def multiply(
        self, layer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """Sum over a token's experts `ids` (over all ranks) of their outputs times `weights`."""
        raise NotImplementedError


class Wint4Experts(ExpertsMethod):
    """What wint4 on any device has in common: states plus 8 in uint8 [N, K], scales [N]."""

    format = "wint4"

    def cut(self, projection: str, stored: Tensors) -> Tensors:
        columns, rows = self.shares[projection]
        raw = stored["quant_weight"].view(torch.uint8)
        tiles = layout.cut_interleaved(raw, 4, columns, rows)
        states = [layout.states(part.to(self.device()), 4) for part in tiles]
        scale = stored["weight_scale"]
        scales = [scale[p.source : p.source + p.size] for p in columns]
        return {"quant_weight": torch.cat(states), "weight_scale": torch.cat(scales)}


def _local(layer: Any, expert: int) -> int:
    mapping = layer.expert_map
    return expert if mapping is None else int(mapping[expert])
