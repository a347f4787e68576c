# SPDX-License-Identifier: Apache-2.0
"""Products with matrices of floats or small integers, as the embedded server multiplies them.

Integers stay integers in memory and bfloat16 stays bfloat16; both are exact. Every output is one
chain of float32 multiply-adds in the order of the input rows: its bits depend neither on the other
rows of x nor on threads or instruction set, where a BLAS chooses its order by the number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..codec import formats
from ..codec.weight_only import deinterleave
from ..compiled import core as _core
from . import checks

INTEGER_FORMATS = formats.named(kind=formats.Kind.INTEGER)


@dataclass(frozen=True)
class DenseMatrix:
    """One matrix [k, n] ready for multiply(); make it with from_floats() or from_integers()."""

    core: _core.Dense

    @classmethod
    def from_floats(cls, weight: np.ndarray) -> DenseMatrix:
        """weight float32 [k, n]; kept as bfloat16 where that loses nothing.

        Raises:
            ValueError: for another dtype or number of dimensions.
        """
        if weight.dtype != np.float32 or weight.ndim != 2 or not weight.size:
            raise ValueError(
                f"weight must be float32 [k, n], got {weight.dtype}{list(weight.shape)}"
            )
        return cls(_core.pack_floats(np.ascontiguousarray(weight)))

    @classmethod
    def from_integers(cls, format: str, tensors: Mapping[str, np.ndarray]) -> DenseMatrix:
        """FastDeploy's tensors of a wint8 or wint4 matrix.

        Raises:
            ValueError: for another format, dtype or shape.
        """
        if format not in INTEGER_FORMATS:
            names = ", ".join(INTEGER_FORMATS)
            raise ValueError(f"format must be one of {names}, got {format!r}")
        bits = int(formats.get(format).bits_per_weight)
        stored, scale = tensors["quant_weight"], tensors["weight_scale"]
        specs = formats.tensor_specs(format, stored.shape[-1], stored.shape[0] * 8 // bits)
        shape, dtype = specs["quant_weight"]
        if stored.dtype != formats.SAFETENSORS_DTYPES[dtype] or stored.shape != shape:
            raise ValueError(f"quant_weight must be int8, got {stored.dtype}{list(stored.shape)}")
        return cls.from_states(deinterleave(stored, bits), scale, bits)

    @classmethod
    def from_states(cls, states: np.ndarray, scale: np.ndarray, bits: int) -> DenseMatrix:
        """Signed states int8 [k, n] of 8 or 4 bits and one scale a column [n]."""
        values = np.ascontiguousarray(states)
        return cls(_core.pack_integers(values, np.asarray(scale, np.float32), bits))

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
        """Bytes of host memory that the values and scales take."""
        return self.core.nbytes

    def columns(self, wanted: np.ndarray) -> np.ndarray:
        """float32 [len(wanted), k]: columns as rows (embeddings of tokens, tied to the head)."""
        return _core.dense_columns(self.core, np.ascontiguousarray(wanted, np.int64))


def multiply(
    x: np.ndarray, weight: DenseMatrix, threads: int | None = None, isa: str = "auto"
) -> np.ndarray:
    """x float32 [rows, k] @ weight [k, n] -> float32 [rows, n]. `isa` pins a build (tests).

    Raises:
        ValueError: for another dtype or shape of x.
    """
    if x.dtype != np.float32 or x.ndim != 2 or x.shape[1] != weight.k:
        raise ValueError(f"x must be float32 [rows, {weight.k}], got {x.dtype}{list(x.shape)}")
    return _core.multiply_dense(x, weight.core, checks.threads(threads), isa)
