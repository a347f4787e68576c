# SPDX-License-Identifier: Apache-2.0
"""WINT2, 2.06 bits per weight: code (6, 4, 3) clustered into bytes, 4-bit scales in groups of 64.

One byte q stands for rows 4i..4i+3 of a column. Its 15-bit code is

    code = floor(q * code_scale + code_zp + 1/2)

(half up, not half to even; Algorithm 3 of the paper writes `round`). Row 4i is bits 14..9 of the
code, 4i+1 bits 11..6, 4i+2 bits 8..3, 4i+3 bits 5..0; each 6-bit state minus 32, times the group's
4-bit scale, times the column's super scale, is the weight.

FastDeploy's kernels compute the code in float32 in different orders (docs/reference/formats.md);
with integer code_scale and code_zp all orders agree exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .convolution import GROUP, ConvolutionalCode
from .floats import BFLOAT16, round_to

CODE = ConvolutionalCode(6, 4, 3)
ROWS_PER_BYTE = CODE.N
# Two 4-bit scales share a byte, so K must hold whole pairs of groups.
ROW_MULTIPLE = 2 * GROUP
CODE_MAX = (1 << CODE.T) - 1
SCALE_MAX = 15


@dataclass(frozen=True)
class ByteTensors:
    """What WINT2 and other codes of one byte for four weights store of a [K, N] matrix.

    quant_weight uint8 [K/4, N]; weight_scale uint8 [K/128, N], groups 2j in the high and 2j+1 in
    the low nibble; super_scales bfloat16 [N].
    """

    quant_weight: np.ndarray
    weight_scale: np.ndarray
    super_scales: np.ndarray

    def _expected(self, rows: int, n: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of each other tensor, for that many rows of bytes."""
        return {
            "weight_scale": ((rows * ROWS_PER_BYTE // ROW_MULTIPLE, n), np.dtype(np.uint8)),
            "super_scales": ((n,), BFLOAT16),
        }

    def __post_init__(self) -> None:
        q, n = self.quant_weight, self.quant_weight.shape[-1]
        if q.ndim != 2 or q.dtype != np.uint8 or (q.shape[0] * ROWS_PER_BYTE) % ROW_MULTIPLE:
            raise ValueError(
                f"quant_weight must be uint8 [K/4, N] with 128 | K, got {q.dtype}{q.shape}"
            )
        for field, (shape, dtype) in self._expected(q.shape[0], n).items():
            array = getattr(self, field)
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{field} must be {dtype}{shape}, got {array.dtype}{array.shape}")

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N) of the matrix."""
        return self.quant_weight.shape[0] * ROWS_PER_BYTE, self.quant_weight.shape[1]


@dataclass(frozen=True)
class Wint2Tensors(ByteTensors):
    """The five stored tensors of one [K, N] matrix (FastDeploy's names).

    quant_weight uint8 [K/4, N]; weight_scale uint8 [K/128, N], groups 2j in the high and 2j+1 in
    the low nibble; super_scales bfloat16 [N]; code_scale, code_zp float32 [N].
    """

    code_scale: np.ndarray
    code_zp: np.ndarray

    def _expected(self, rows: int, n: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        column = ((n,), np.dtype(np.float32))
        return super()._expected(rows, n) | {"code_scale": column, "code_zp": column}


def decode_codes(q: np.ndarray, code_scale: np.ndarray, code_zp: np.ndarray) -> np.ndarray:
    """15-bit codes of bytes: uint8 [..., N], float32 [N], float32 [N] -> int32 [..., N].

    The reference rounding is FastDeploy's fused kernel (2.1 and later): one float32 fused
    multiply-add of q, code_scale and float32(code_zp + 1/2), then floor, of which the low 15 bits
    are used. float64 holds product and sum exactly, so one rounding to float32 is that fma.
    """
    offset = (code_zp.astype(np.float32) + np.float32(0.5)).astype(np.float64)
    exact = q.astype(np.float64) * code_scale.astype(np.float64) + offset
    return np.floor(exact.astype(np.float32)).astype(np.int64).astype(np.int32) & CODE_MAX


def decode_states(q: np.ndarray, code_scale: np.ndarray, code_zp: np.ndarray) -> np.ndarray:
    """Signed states -32..31 of bytes: uint8 [K/4, N] -> int8 [K, N]."""
    codes = decode_codes(q, code_scale, code_zp)
    out = np.empty((q.shape[0], ROWS_PER_BYTE, q.shape[1]), dtype=np.int8)
    for i, shift in enumerate(CODE.shifts):
        out[:, i] = ((codes >> shift) & CODE.mask) - CODE.zero_point
    return out.reshape(-1, q.shape[1])


def codebook(code_scale: float, code_zp: float) -> np.ndarray:
    """The 256 decodable vectors of one pair: int32 [256, 4] of signed states."""
    q = np.arange(256, dtype=np.uint8)[:, None]
    pair = (np.array([code_scale], np.float32), np.array([code_zp], np.float32))
    return decode_states(q, *pair).reshape(256, ROWS_PER_BYTE).astype(np.int32)


def code_range(code_scale: np.ndarray, code_zp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest code of each column's pair, before any bits are cut: int64 [N] each.

    A sound checkpoint keeps both inside [0, 32767]: outside, some kernels wrap and some clip.
    """
    first = code_zp.astype(np.float64) + 0.5
    last = first + 255 * code_scale.astype(np.float64)
    low, high = np.floor(np.minimum(first, last)), np.floor(np.maximum(first, last))
    return low.astype(np.int64), high.astype(np.int64)


def pack_scales(scales: np.ndarray) -> np.ndarray:
    """4-bit group scales [K/64, N] (0..15) -> uint8 [K/128, N], even groups in the high nibble.

    Raises:
        ValueError: for an odd number of groups, or a scale outside 0..15.
    """
    if scales.shape[0] % 2 or np.any(scales > SCALE_MAX):
        raise ValueError("pack_scales needs an even number of groups and scales in 0..15")
    scales = scales.astype(np.uint8)
    return (scales[0::2] << 4) | scales[1::2]


def unpack_scales(packed: np.ndarray) -> np.ndarray:
    """uint8 [K/128, N] -> uint8 [K/64, N]: the inverse of pack_scales."""
    out = np.empty((packed.shape[0] * 2, packed.shape[1]), dtype=np.uint8)
    out[0::2], out[1::2] = packed >> 4, packed & 15
    return out


def dequantize(t: Wint2Tensors, runtime: str = "bfloat16") -> np.ndarray:
    """The weights an engine of the given type computes with: float32 [K, N].

    For bfloat16 and float16 the scale (nibble * super scale) and the product (state * scale) are
    each rounded to that type, as FastDeploy's fused kernel does; "float32" keeps both exact.
    """
    k, n = t.shape
    scales = unpack_scales(t.weight_scale).astype(np.float32) * t.super_scales.astype(np.float32)
    scales = round_to(scales, runtime)
    states = decode_states(t.quant_weight, t.code_scale, t.code_zp)
    weights = states.reshape(k // GROUP, GROUP, n).astype(np.float32) * scales[:, None, :]
    return round_to(weights, runtime).reshape(k, n)
