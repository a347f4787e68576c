# SPDX-License-Identifier: Apache-2.0
"""The C interface of the GPU library's products: structures, enumerations, argument types.

The one definition for ctypes of what custom_ops/gpu/moe/*.h declare, held against them by
tests/test_ops_gpu_abi.py. Pointers are addresses of device memory, streams are CUDA's handles.
Imports nothing of the package: benchmarks/gpu/ccqlib.py reads it alone.
"""

from __future__ import annotations

import ctypes
from typing import Any

# ccq_library_version() of custom_ops/gpu/common/library.cu.
VERSION = 2
BFLOAT16, FLOAT16 = 0, 1  # enum ccq_dtype
PAIRS_INTEGER, PAIRS_GENERAL, PAIRS_TRELLIS = 0, 1, 2  # enum ccq_pairs
ROWS_PLAIN, ROWS_FASTDEPLOY = 0, 1  # enum ccq_row_order
# enum ccq_format, as far as there are products with stored words.
SPARE_FORMATS = {"ccq-2.5": 1, "ccq-2.75": 2}
LINEAR_W8_MAX_ROWS = 64
ROUTER_MAX_ROWS = 64


def _pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names]


def _integers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int) for name in names]


class Projection(ctypes.Structure):
    """struct ccq_moe_projection (moe_block.h)."""

    _fields_ = [*_pointers("quant", "scales", "columns"), *_integers("pairs")]


class Shape(ctypes.Structure):
    """struct ccq_moe_shape (moe_block.h)."""

    _fields_ = _integers("hidden", "width", "experts", "dtype", "row_order")


class GemmArgs(ctypes.Structure):
    """struct ccq_moe_gemm_args (moe_gemm.h)."""

    _fields_ = [
        *_pointers("x", "offsets", "quant", "scales", "columns", "row_scale", "out", "workspace"),
        *_integers("rows", "k", "n", "experts", "dtype", "pairs", "row_order"),
    ]


class SpareArgs(ctypes.Structure):
    """struct ccq_spare_gemm_args (linear_ccq.h)."""

    _fields_ = [
        *_pointers("x", "offsets", "quant_weight", "super_scales", "row_scale", "out"),
        *_integers("rows", "k", "n", "experts", "format", "dtype", "row_order"),
    ]


class LinearW8Args(ctypes.Structure):
    """struct ccq_linear_w8_args (linear_w8.h)."""

    _fields_ = [
        *_pointers("x", "weight", "scale", "out", "workspace", "counters"),
        *_integers("rows", "k", "n"),
    ]


class W4Args(ctypes.Structure):
    """struct ccq_w4_gemm_args (linear_w4.h)."""

    _fields_ = [
        *_pointers("x", "offsets", "weight", "scale", "out"),
        *_integers("rows", "k", "n", "experts", "scale_stride", "tokens"),
    ]


class RouterArgs(ctypes.Structure):
    """struct ccq_router_args (router.h)."""

    _fields_ = [*_pointers("x", "weight", "out"), *_integers("rows", "k", "experts")]


def trellis_bytes(k: int, n: int) -> tuple[int, int]:
    """Bytes of one CCQ-2T matrix's units and columns (trellis_repack.h)."""
    fours = -(-n // 64)
    return fours * (k // 128) * 2176, fours * 256


_P, _I, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
# Function -> (argument types, result type). int stands for a CUDA error code too.
FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "ccq_repack_wint2": ([_P, _P, _P, _I, _P, _P, _I, _I, _I, _P, _P, _P, _P, _P], _I),
    "ccq_unpack_wint2": ([_P, _P, _P, _I, _I, _I, _P, _P, _P, _I, _P, _P, _P], _I),
    "ccq_trellis_units_bytes": ([_I, _I, _I], _SIZE),
    "ccq_trellis_columns_bytes": ([_I, _I], _SIZE),
    "ccq_repack_trellis": ([_P, _P, _P, _I, _P, _I, _I, _I, _P, _P, _P], _I),
    "ccq_unpack_trellis": ([_P, _P, _I, _I, _I, _P, _P, _P, _I, _P], _I),
    "ccq_moe_gemm_workspace": ([_I, _I, _I, _I], _SIZE),
    "ccq_moe_gemm": ([_P, _P], _I),
    "ccq_moe_gemm_variant": ([_P], _I),
    "ccq_moe_gemm_choice": ([_I, _I, _I, _I, _I, _I, _I], _I),
    "ccq_moe_ffn_workspace": ([_I, _P], _SIZE),
    "ccq_moe_ffn": ([_P, _P, _I, _P, _P, _P, _P, _P, _P], _I),
    "ccq_moe_workspace": ([_I, _I, _P], _SIZE),
    "ccq_moe": ([_P, _P, _P, _I, _I, _P, _P, _P, _P, _P, _P], _I),
    "ccq_moe_dispatch": ([_P, _P, _I, _I, _I, _I, _P, _P, _P, _P], _I),
    "ccq_moe_combine": ([_P, _P, _P, _I, _I, _I, _I, _P, _P], _I),
    "ccq_swiglu": ([_P, _P, _I, _I, _I, _P], _I),
    "ccq_spare_gemm": ([_P, _P], _I),
    "ccq_linear_w8_workspace": ([_I, _I, _I], _SIZE),
    "ccq_linear_w8_counters": ([_I], _I),
    "ccq_linear_w8": ([_P, _P], _I),
    "ccq_router": ([_P, _P], _I),
    "ccq_w4_gemm": ([_P, _P], _I),
    "ccq_dequant_w4": ([_P, _P, _I, _I, _I, _P, _P], _I),
    "ccq_dequant_w8": ([_P, _P, _I, _I, _I, _P, _P], _I),
}


def declare(library: Any) -> Any:
    """The library with the types of its products declared.

    Raises:
        AttributeError: where it has not all of them.
    """
    for name, (arguments, result) in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library
