# SPDX-License-Identifier: Apache-2.0
"""What a plan is made of: tensors with their formats, and the files that hold them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..families.tensor import Cut, TensorSpec
from .safetensors_format import FLOAT_DTYPES, StoredSpec, shard_name, tensor_bytes

# What is written as the source has it, in any dtype, scales included.
KEPT = "kept"
_UNQUANTIZED = ("bf16", "f32", KEPT)

# Interpreter and libraries, before any tensor is read.
BASE_MEMORY = 150_000_000
# Bytes of host memory per weight at the worst moment, beside the output: stored values and float32,
# or float32, a re-ordered copy and one encoder slice (quantized); measured 8.4 with the output.
QUANTIZED_BYTES_PER_WEIGHT = 9
UNQUANTIZED_BYTES_PER_WEIGHT = 4
SCALED_BYTES_PER_WEIGHT = 3


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the model with its format and stored tensors; all ranks have the same shapes."""

    index: int
    tensor: TensorSpec
    format: str  # "f32", "bf16" and KEPT are not quantized
    specs: tuple[StoredSpec, ...]  # of one rank

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.tensor.name

    @property
    def layer(self) -> int | None:
        """Number of the layer that the tensor is part of; None outside of layers."""
        return self.tensor.layer

    @property
    def shape(self) -> tuple[int, ...]:
        """The canonical shape of the whole tensor."""
        return self.tensor.shape

    @property
    def cut(self) -> Cut | None:
        """How ranks share the tensor; None: every rank holds it whole."""
        return self.tensor.cut

    @property
    def quantized(self) -> bool:
        """Whether this run packs it; a tensor that is kept may be quantized by its source."""
        return self.format not in _UNQUANTIZED

    @property
    def weights(self) -> int:
        """Values of the whole tensor, whatever number of ranks it is cut for."""
        return math.prod(self.shape)

    @property
    def rank_bytes(self) -> int:
        """Bytes of one rank's stored tensors, scales included."""
        return sum(tensor_bytes(dtype, shape) for _, dtype, shape in self.specs)


@dataclass(frozen=True)
class Shard:
    """One output file of every rank and the tensors that it holds, in order."""

    name: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def specs(self) -> list[StoredSpec]:
        """Name, dtype and shape of the stored tensors in the order in which they are written."""
        return [spec for planned in self.tensors for spec in planned.specs]


def working_bytes(planned: PlannedTensor) -> int:
    """Bytes of host memory that a tensor takes on its way, its output included."""
    if planned.format == KEPT:
        floats = all(dtype in FLOAT_DTYPES for _, dtype, _ in planned.specs)
        # What has scales is read again, some rows at a time, for a mask of what is not finite.
        return planned.rank_bytes + (0 if floats else planned.weights * SCALED_BYTES_PER_WEIGHT)
    each = QUANTIZED_BYTES_PER_WEIGHT if planned.quantized else UNQUANTIZED_BYTES_PER_WEIGHT
    return planned.weights * each + planned.rank_bytes


def split(tensors: Sequence[PlannedTensor], max_bytes: int) -> tuple[Shard, ...]:
    """Shards of at most `max_bytes`; the tensors of one matrix stay together."""
    groups: list[list[PlannedTensor]] = []
    budget = -1
    for planned in tensors:
        if not groups or planned.rank_bytes > budget:
            groups.append([])
            budget = max_bytes
        groups[-1].append(planned)
        budget -= planned.rank_bytes
    count = len(groups)
    return tuple(Shard(shard_name(i, count), tuple(group)) for i, group in enumerate(groups))
