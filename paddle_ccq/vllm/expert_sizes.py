# SPDX-License-Identifier: Apache-2.0
"""Bytes of routed experts on a GPU, in the layouts that gpu_experts.py allocates; free of vLLM."""

from __future__ import annotations

from ..checkpoint.planned import PlannedTensor
from ..checkpoint.safetensors_format import tensor_bytes
from ..codec import formats, trellis
from ..ops.gpu_abi import trellis_bytes

# Of a WINT2 column: scale, zero-point and both code constants, prepared for the kernels.
WINT2_COLUMN_BYTES = 16
# vLLM's int4 experts take a scale for each group of rows, wint4 has one for a column.
WINT4_GROUP = 128


def expert_bytes(format: str, k: int, n: int) -> int:
    """One expert's matrix [k, n], of which k is a multiple of 128."""
    if format == "wint2":
        return n * k // 4 + n * k // 128 + WINT2_COLUMN_BYTES * n
    if format == trellis.NAME:
        return sum(trellis_bytes(k, n))
    if format == "wint4":
        return n * k // 2 + 2 * n * (k // WINT4_GROUP)
    return sum(tensor_bytes(dtype, shape) for shape, dtype in _specs(format, k, n))


def _specs(format: str, k: int, n: int) -> list[tuple[tuple[int, ...], str]]:
    return list(formats.tensor_specs(format, k, n).values())


def rank_bytes(planned: PlannedTensor, ranks: int, experts: int) -> int:
    """Bytes of an expert's matrix on the first card of `ranks`.

    Args:
        experts: of the layer, where each card has whole ones; 0: each has a part of every one.
    """
    tensor, shape = planned.tensor, planned.shape
    if experts:
        if tensor.expert is not None and tensor.expert >= experts // ranks:
            return 0
    elif tensor.cut is not None:
        shape = tensor.cut.rank_shape(shape, ranks)
    return expert_bytes(planned.format, *shape)
