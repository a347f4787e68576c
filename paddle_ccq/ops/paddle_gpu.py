# SPDX-License-Identifier: Apache-2.0
"""The operators on a GPU over Paddle tensors: the names, formats and meaning of the CPU's.

Needs the compiled ops (custom_ops/setup.py). WINT2 and CCQ-2T are repacked on the GPU for the
tensor-core kernels; 2.5 and 2.75 bits are read as stored, by a kernel made for few rows. Unlike on
the CPU, values between the products of an expert are rounded to the activations' type.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..codec.floats import BFLOAT16
from ..codec.row_order import PLAIN
from ..errors import CcqError
from . import checks

MODULE = "paddle_ccq_ops"
# Names the compiled ops where they are not installed as MODULE.
ENVIRONMENT = "PADDLE_CCQ_PADDLE_OPS"
COLUMN_MULTIPLE = 16
_STORED = ("quant_weight", "super_scales")
_WINT2 = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")
# Formats that are repacked, and what of a matrix's stored tensors that takes.
_REPACKED = {"wint2": _WINT2, "ccq-2t": _WINT2[:3]}


@cache
def _ops() -> Any:
    """What has the ops as functions: MODULE, or the library that ENVIRONMENT names.

    Raises:
        CcqError: if there are none, or they do not load.
    """
    path = os.environ.get(ENVIRONMENT)
    try:
        if not path:
            return importlib.import_module(MODULE)
        from paddle.utils.cpp_extension import extension_utils

        extension_utils.load_op_meta_info_and_register_op(path)
    except Exception as error:  # a library that does not fit raises errors of many kinds
        raise CcqError(
            f"{path or MODULE}: the compiled ops do not load ({error}); "
            "pip install --no-build-isolation ./custom_ops"
        ) from None
    return None


def call(name: str, *arguments: Any) -> list[Any]:
    """One compiled op by its name; the list of its outputs."""
    module = _ops()
    if module is not None:
        found = getattr(module, name)(*arguments)
    else:
        from paddle.base import core

        found = core.eager._run_custom_op(name, *arguments)
    return list(found) if isinstance(found, (list, tuple)) else [found]


@dataclass(frozen=True)
class GpuMatrices:
    """One matrix [k, n] for each of `experts` experts, on the GPU; make it with repack()."""

    format: str
    row_order: str
    experts: int
    k: int
    n: int
    tensors: tuple[Any, ...]
    integer_pairs: bool = False

    def options(self) -> tuple[Any, ...]:
        """Attributes of an op that multiplies with these alone."""
        first = self.integer_pairs if self.format in _REPACKED else self.format
        return first, self.row_order


@dataclass(frozen=True)
class GpuExperts:
    """The experts of one layer on the GPU; make it with repack_experts()."""

    up_gate: GpuMatrices
    down: GpuMatrices

    def arguments(self) -> tuple[Any, ...]:
        """Tensors and attributes of an op that multiplies with both."""
        up, down = self.up_gate, self.down
        repacked = up.format in _REPACKED
        kinds = (up.integer_pairs, down.integer_pairs) if repacked else (up.format,)
        return (*up.tensors, *down.tensors, *kinds, up.row_order)


def _upload(array: np.ndarray) -> Any:
    import paddle

    # The device in use: a process of several cards has set its own.
    kind, _, number = paddle.device.get_device().partition(":")
    place = paddle.CUDAPlace(int(number) if kind == "gpu" else 0)
    if array.dtype == BFLOAT16:
        return paddle.to_tensor(array.view(np.uint16), dtype="bfloat16", place=place)
    return paddle.to_tensor(array, place=place)


def repack(
    format: str,
    tensors: Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]],
    row_order: str = PLAIN,
) -> GpuMatrices:
    """Stored tensors (NumPy) of one matrix, or of every expert's, onto the GPU as it reads them.

    Raises:
        ValueError: naming the tensor or argument that does not fit; N must be a multiple of 16.
        CcqError: without the compiled ops.
    """
    checks.row_order_of(format, row_order)
    parts = [tensors] if isinstance(tensors, Mapping) else list(tensors)
    if not parts:
        raise ValueError("tensors is empty")
    found = [checks.stored(format, part) for part in parts]
    _, k, n = found[0]
    for e, (_, other_k, other_n) in enumerate(found):
        if (other_k, other_n) != (k, n):
            raise ValueError(f"tensors[{e}] is [{other_k}, {other_n}], tensors[0] is [{k}, {n}]")
    if n % COLUMN_MULTIPLE:
        raise ValueError(f"quant_weight: N must be a multiple of {COLUMN_MULTIPLE}, got {n}")
    names = _REPACKED.get(format, _STORED)
    stacked = [_upload(np.stack([part[name] for part, _, _ in found])) for name in names]
    if format not in _REPACKED:
        return GpuMatrices(format, row_order, len(parts), k, n, tuple(stacked))
    if format != "wint2":
        packed = call("ccq_repack_trellis", *stacked)
        return GpuMatrices(format, row_order, len(parts), k, n, tuple(packed))
    *packed, kind = call("ccq_repack", *stacked)
    integer = int(kind.numpy()[0]) == 0
    return GpuMatrices(format, row_order, len(parts), k, n, tuple(packed), integer)


def repack_experts(
    format: str,
    up_gate: Sequence[Mapping[str, np.ndarray]],
    down: Sequence[Mapping[str, np.ndarray]],
    row_order: str = PLAIN,
) -> GpuExperts:
    """Stored tensors of every expert's up_gate_proj and down_proj, in expert order.

    Raises:
        ValueError: as repack(), and if the projections' shapes do not belong together.
        CcqError: without the compiled ops.
    """
    if len(up_gate) != len(down):
        raise ValueError(f"up_gate has {len(up_gate)} experts, down {len(down)}")
    up, lower = repack(format, list(up_gate), row_order), repack(format, list(down), row_order)
    checks.projections((up.k, up.n), (lower.k, lower.n))
    return GpuExperts(up, lower)


def dequant(format: str, tensors: Mapping[str, np.ndarray], dtype: str = "bfloat16") -> Any:
    """[K, N] of `dtype` on the GPU, rows in stored order: codec.formats.decode bit for bit.

    Raises:
        ValueError: naming the tensor or argument that does not fit; ccq-2t is decoded by the CPU's
            operator alone.
        CcqError: without the compiled ops.
    """
    found, _, _ = checks.stored(format, tensors)
    checks.decoded_on_gpu(format)
    rest = (found.get(name) for name in ("weight_scale", "code_scale", "code_zp"))
    inputs = [None if t is None else _upload(t) for t in (*(found[s] for s in _STORED), *rest)]
    return call("ccq_dequant", *inputs, format, dtype)[0]


def _tensor(value: Any, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Any:
    """A contiguous Paddle tensor on the GPU of this shape (-1: any size) and one of these types."""
    import paddle

    if not isinstance(value, paddle.Tensor):
        raise ValueError(f"{name} must be a Paddle tensor, got {type(value).__name__}")
    if not value.place.is_gpu_place():
        raise ValueError(f"{name} must be on a GPU, it is on {value.place}")
    if value.dtype not in tuple(getattr(paddle, d) for d in dtypes):
        raise ValueError(f"{name} must be {' or '.join(dtypes)}, got {value.dtype}")
    found = tuple(value.shape)
    if len(found) != len(shape) or any(w not in (-1, f) for w, f in zip(shape, found, strict=True)):
        raise ValueError(f"{name} must be {list(shape)}, got {list(found)}")
    if not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    return value


def _activations(x: Any, width: int) -> Any:
    return _tensor(x, "x", (-1, width), ("bfloat16", "float16"))


def _op(name: str, weights: GpuMatrices) -> str:
    return name if weights.format in _REPACKED else f"{name}_stored"


def _one_of(value: Any, name: str, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {kind.__name__}, got {type(value).__name__}")
    return value


def linear(x: Any, weight: GpuMatrices) -> Any:
    """ccq_linear: x [M, K] @ weight [K, N] -> [M, N] in x's dtype, bfloat16 or float16.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if _one_of(weight, "weight", GpuMatrices).experts != 1:
        raise ValueError(f"weight must be one matrix, it holds {weight.experts}")
    _activations(x, weight.k)
    return call(_op("ccq_linear", weight), x, *weight.tensors, *weight.options())[0]


def moe_gemm(x: Any, experts: GpuMatrices, offsets: Any, row_scale: Any = None) -> Any:
    """ccq_moe_gemm: rows of x [T, K], sorted by expert, each times its expert's matrix -> [T, N].

    Args:
        x: bfloat16 or float16.
        experts: one matrix an expert.
        offsets: int64 [experts], the running count of rows. Stays on the GPU: that it does not
            fall and ends at T is the caller's promise.
        row_scale: float32 [T] or None, multiplied into the result before rounding.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _activations(x, _one_of(experts, "experts", GpuMatrices).k)
    _tensor(offsets, "offsets", (experts.experts,), ("int64",))
    if row_scale is not None:
        _tensor(row_scale, "row_scale", (x.shape[0],), ("float32",))
    name = _op("ccq_moe_gemm", experts)
    return call(name, x, offsets, *experts.tensors, row_scale, *experts.options())[0]


def moe_ffn(x: Any, experts: GpuExperts, offsets: Any) -> Any:
    """ccq_moe_ffn: down(silu(gate(x)) * up(x)) of rows sorted by expert, [T, hidden] -> the same.

    Arguments as moe_gemm.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    up = _one_of(experts, "experts", GpuExperts).up_gate
    _activations(x, up.k)
    _tensor(offsets, "offsets", (up.experts,), ("int64",))
    return call(_op("ccq_moe_ffn", up), x, offsets, *experts.arguments())[0]


def moe(x: Any, experts: GpuExperts, topk_ids: Any, topk_weights: Any) -> Any:
    """ccq_moe: sum over j of topk_weights[m, j] * ffn of expert topk_ids[m, j] on x[m].

    Args:
        x: [M, hidden] of bfloat16 or float16.
        topk_ids: int64 [M, top_k]; an id outside 0..experts-1 adds nothing.
        topk_weights: float32 [M, top_k], used as they are.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    up = _one_of(experts, "experts", GpuExperts).up_gate
    _activations(x, up.k)
    _tensor(topk_ids, "topk_ids", (x.shape[0], -1), ("int64",))
    _tensor(topk_weights, "topk_weights", tuple(topk_ids.shape), ("float32",))
    return call(_op("ccq_moe", up), x, topk_ids, topk_weights, *experts.arguments())[0]
