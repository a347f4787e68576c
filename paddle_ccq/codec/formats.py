# SPDX-License-Identifier: Apache-2.0
"""The formats by name: what tensors a matrix becomes, and how to turn them back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import wint2
from .convolution import bits_per_weight
from .floats import BFLOAT16, round_to
from .spare_scale import CCQ_2_5, CCQ_2_75, SpareScaleFormat, SpareScaleTensors
from .spare_scale import dequantize as dequantize_spare_scale
from .weight_only import COLUMN_MULTIPLE, TILE_ROWS, dequantize_wint4, dequantize_wint8

Tensors = dict[str, np.ndarray]
# Suffix -> (shape, safetensors dtype); suffixes are FastDeploy's.
Specs = dict[str, tuple[tuple[int, ...], str]]

SAFETENSORS_DTYPES = {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "BF16": BFLOAT16,
    "F32": np.dtype(np.float32),
}


@dataclass(frozen=True)
class Format:
    """One storage format of a [K, N] matrix.

    bits_per_weight counts codes and group scales, not what is stored once a column;
    row_multiple and column_multiple are what K and N must be multiples of.
    """

    name: str
    bits_per_weight: float
    row_multiple: int
    column_multiple: int
    specs: Callable[[int, int], Specs]
    dequantize: Callable[[Tensors, str], np.ndarray]

    @property
    def is_ccq(self) -> bool:
        """Convolutional code (as opposed to plain floats or integers)."""
        return self.name in CCQ_FORMATS


def _spare_scale(f: SpareScaleFormat) -> Format:
    storage = "U8" if f.storage == np.uint8 else "I16"
    return Format(
        f.name,
        f.bits_per_weight,
        row_multiple=64,
        column_multiple=1,
        specs=lambda k, n: {
            "quant_weight": ((k // 64 * f.words_per_group, n), storage),
            "super_scales": ((n,), "BF16"),
        },
        dequantize=lambda t, runtime: dequantize_spare_scale(SpareScaleTensors(f, **t), runtime),
    )


def _weight_only(bits: int, dequantize: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Format:
    return Format(
        f"wint{bits}",
        float(bits),
        row_multiple=TILE_ROWS,
        column_multiple=COLUMN_MULTIPLE,
        specs=lambda k, n: {
            "quant_weight": ((n * bits // 8, k), "I8"),
            "weight_scale": ((n,), "BF16"),
        },
        dequantize=lambda t, runtime: round_to(
            dequantize(t["quant_weight"], t["weight_scale"]), runtime
        ),
    )


_ALL = (
    Format(
        "bf16",
        16.0,
        row_multiple=1,
        column_multiple=1,
        specs=lambda k, n: {"weight": ((k, n), "BF16")},
        dequantize=lambda t, runtime: round_to(t["weight"].astype(np.float32), runtime),
    ),
    _weight_only(8, dequantize_wint8),
    _weight_only(4, dequantize_wint4),
    Format(
        "wint2",
        bits_per_weight(8, wint2.ROWS_PER_BYTE, wint2.GROUP, scale_bits=4),
        row_multiple=wint2.ROW_MULTIPLE,
        # FastDeploy's loader regroups columns by eight.
        column_multiple=8,
        specs=lambda k, n: {
            "quant_weight": ((k // 4, n), "U8"),
            "weight_scale": ((k // 128, n), "U8"),
            "super_scales": ((n,), "BF16"),
            "code_scale": ((n,), "F32"),
            "code_zp": ((n,), "F32"),
        },
        dequantize=lambda t, runtime: wint2.dequantize(wint2.Wint2Tensors(**t), runtime),
    ),
    _spare_scale(CCQ_2_5),
    _spare_scale(CCQ_2_75),
)

FORMATS: dict[str, Format] = {f.name: f for f in _ALL}
CCQ_FORMATS = ("wint2", CCQ_2_5.name, CCQ_2_75.name)


def get(name: str) -> Format:
    """The format of that name.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def tensor_specs(name: str, k: int, n: int) -> Specs:
    """Stored tensors of a [k, n] matrix: suffix -> (shape, safetensors dtype)."""
    return get(name).specs(k, n)


def dequantize(name: str, tensors: Tensors, runtime: str = "bfloat16") -> np.ndarray:
    """Stored tensors -> float32 [K, N] in stored row order (see row_order.py for WINT2)."""
    return get(name).dequantize(tensors, runtime)


def shape_problem(name: str, k: int, n: int) -> str | None:
    """Why a [k, n] matrix cannot be stored in this format, in plain words; None if it can."""
    f = get(name)
    if k % f.row_multiple:
        return f"{name} needs K (input size) a multiple of {f.row_multiple}, got {k}"
    if n % f.column_multiple:
        return f"{name} needs N (output size) a multiple of {f.column_multiple}, got {n}"
    return None


def stored_bits_per_weight(name: str, k: int, n: int) -> float:
    """Bits per weight including everything stored once a column."""
    total = 0
    for shape, dtype in tensor_specs(name, k, n).values():
        total += int(np.prod(shape)) * SAFETENSORS_DTYPES[dtype].itemsize * 8
    return total / (k * n)
