# SPDX-License-Identifier: Apache-2.0
"""Weights in the layout that the CPU ops stream: made once at load, exact, of the same size.

In a checkpoint the sixteen bytes of a column's 64-group lie N bytes apart. The CPU's layout puts
sixteen columns next to each other, four byte rows of a column into one 32-bit lane, and the groups
of these columns one behind the other, so that a product reads memory from front to back, each
cache line once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..codec.floats import BFLOAT16
from ..codec.formats import SAFETENSORS_DTYPES, Tensors, tensor_specs
from ..codec.row_order import PLAIN
from ..compiled import core as _core
from . import checks

COLUMN_MULTIPLE = 16
_NONE_U8 = np.zeros((0, 0), np.uint8)
_NONE_F32 = np.zeros(0, np.float32)


def core_arguments(format: str, tensors: Tensors) -> tuple[object, ...]:
    """Checked tensors as the compiled core takes them."""
    return (
        format,
        tensors["quant_weight"],
        tensors.get("weight_scale", _NONE_U8),
        tensors["super_scales"].astype(np.float32),
        tensors.get("code_scale", _NONE_F32),
        tensors.get("code_zp", _NONE_F32),
    )


@dataclass(frozen=True)
class PackedMatrix:
    """One matrix [k, n] ready for linear(); make it with repack().

    Attributes:
        core: the compiled object that owns the memory.
        row_order: order of the input rows inside a 64-group (codec/row_order.py).
    """

    core: _core.Packed
    row_order: str

    @property
    def format(self) -> str:
        """One of codec.formats.EXPERT_FORMATS."""
        return self.core.format

    @property
    def k(self) -> int:
        """Inputs of a product: entries of a row of x."""
        return self.core.k

    @property
    def n(self) -> int:
        """Outputs of a product."""
        return self.core.n

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that codes and scales of all levels take."""
        return self.core.nbytes

    def unpack(self) -> Tensors:
        """The stored tensors that repack() was given, bit for bit."""
        words, scales, supers, code_scale, code_zp = self.core.unpack()
        found = {
            "quant_weight": words,
            "weight_scale": scales,
            "super_scales": supers.astype(BFLOAT16),
            "code_scale": code_scale,
            "code_zp": code_zp,
        }
        specs = tensor_specs(self.format, self.k, self.n)
        return {s: found[s].view(SAFETENSORS_DTYPES[dtype]) for s, (_, dtype) in specs.items()}


@dataclass(frozen=True)
class PackedExperts:
    """The experts of one layer: up_gate [hidden, 2 * width] and down [width, hidden] of each."""

    up_gate: tuple[PackedMatrix, ...]
    down: tuple[PackedMatrix, ...]

    def __len__(self) -> int:
        return len(self.up_gate)

    @property
    def hidden(self) -> int:
        """Entries of a token's row, before and after the experts."""
        return self.up_gate[0].k

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that the matrices of all experts take."""
        return sum(m.nbytes for m in (*self.up_gate, *self.down))


def repack(
    format: str,
    tensors: Mapping[str, np.ndarray],
    row_order: str = PLAIN,
    before: np.ndarray | None = None,
) -> PackedMatrix:
    """Stored tensors of a matrix (suffix -> array) -> the CPU's layout.

    Args:
        before: uint8 [N], ccq-2t alone: the code bytes before the first ones, where the tensors are
            the later input rows of a larger matrix; None for zeros, as at a column's beginning.

    Raises:
        ValueError: naming the tensor or argument that does not fit; N must be a multiple of 16.
    """
    checks.row_order_of(format, row_order)
    found, _, n = checks.stored(format, tensors)
    if n % COLUMN_MULTIPLE:
        raise ValueError(f"quant_weight: N must be a multiple of {COLUMN_MULTIPLE}, got {n}")
    return PackedMatrix(
        _core.repack(*core_arguments(format, found), checks.before(format, before, n)), row_order
    )


def same_shape(matrices: Sequence[PackedMatrix], name: str) -> tuple[PackedMatrix, ...]:
    """The matrices, all of one shape and row order.

    Raises:
        ValueError: for none, or for one that differs, naming it.
    """
    if not matrices:
        raise ValueError(f"{name} is empty")
    first = matrices[0]
    for e, m in enumerate(matrices):
        if not isinstance(m, PackedMatrix):
            raise ValueError(
                f"{name}[{e}] must be a PackedMatrix (see repack), got {type(m).__name__}"
            )
        if (m.k, m.n, m.row_order) != (first.k, first.n, first.row_order):
            raise ValueError(
                f"{name}[{e}] is [{m.k}, {m.n}] in {m.row_order} order, "
                f"{name}[0] is [{first.k}, {first.n}] in {first.row_order} order"
            )
    return tuple(matrices)


def repack_experts(
    format: str,
    up_gate: Sequence[Mapping[str, np.ndarray]],
    down: Sequence[Mapping[str, np.ndarray]],
    row_order: str = PLAIN,
) -> PackedExperts:
    """FastDeploy's tensors of every expert's up_gate_proj and down_proj, in expert order.

    Raises:
        ValueError: as repack(), and if the projections' shapes do not belong together.
    """
    if len(up_gate) != len(down):
        raise ValueError(f"up_gate has {len(up_gate)} experts, down {len(down)}")
    up = same_shape([repack(format, t, row_order) for t in up_gate], "up_gate")
    lower = same_shape([repack(format, t, row_order) for t in down], "down")
    checks.projections((up[0].k, up[0].n), (lower[0].k, lower[0].n))
    return PackedExperts(up, lower)
